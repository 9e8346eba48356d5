"""Second moments of what each layer receives, over the batches of a data set."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_plugins._checks import check_text, nearest
from lightning_plugins.compression.calibration.masking import Mask, RowIndex, check_mask, mask_of
from lightning_plugins.compression.calibration.moment_sums import MomentSums
from lightning_plugins.compression.calibration.passes import Forward, check_forward, model_pass, placed
from lightning_plugins.compression.calibration.storage import (
    Files,
    check_options,
    loaded,
    moment_bytes,
    over_processes,
    parts_within,
)
from lightning_plugins.compression.low_rank.decomposition import InputMoment
from lightning_plugins.compression.low_rank.splittable import select_layers
from lightning_plugins.compression.networks.arguments import check_module
from lightning_plugins.compression.networks.evaluation import evaluation, layer_by_layer, uncompiled
from lightning_plugins.distributed import is_distributed, sum_over_ranks


class Calibration:
    """Second moments of what each layer receives: inputs of linear layers, patches of convolutions.

    With them `factorize` keeps what the layers put out on this data, where without them it keeps their weights; and
    `energy_threshold`, `trade_off`, `output_energy` and `beam_search` choose ranks by the error of the outputs.

    Sums are taken in float32, or float64 where a layer's weight is. In a process group every process records its own
    batches, and all get the sums over all of them.

    Args:
        model: The model; it is not changed.
        layers: Dotted name of a layer, a glob over names, or several of them. Globs take what `factorize` can split.
        mask: Leaves padded tokens out: the name of a batch's entry such as ``"attention_mask"``, or a function from a
            batch to a tensor. It is 0 where a token does not count, and has the shape ``(N, T)`` of the layers' rows,
            or ``(N,)`` for whole samples.
        damping: What is added to the diagonal of a moment before it is used, as a fraction of the diagonal's mean; in
            (0, 1]. Rank-deficient moments need some, and the fewer rows were recorded, the more helps.
        effort: What the moments may cost, as a fraction of the layers' own multiplications: where all rows would cost
            more, as for wide inputs and convolutions, a random part of each batch's rows stands for all. None for all.
        memory: How many bytes of moments may be held at a time; None for no limit. Where those of all layers are more,
            `record` goes over the batches several times, some layers each time, and keeps moments in a temporary file.

    Raises:
        ValueError: If an argument is out of its range, no layer is found, or ``memory`` is too little for one layer.
        TypeError: If an argument is of a wrong type.

    Attributes:
        batches: How many batches were recorded, by all processes.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
        >>> calibration = Calibration(net).record([torch.randn(32, 8) for _ in range(4)])
        >>> calibration.moment("0").rows, tuple(calibration.moment("2").total.shape)
        (128, (6, 6))
        >>> from lightning_plugins.compression import factorize
        >>> small = factorize(net, 0.5, calibration=calibration)
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str] = "*",
        *,
        mask: Mask | None = None,
        damping: float = 1e-2,
        effort: float | None = 0.25,
        memory: int | None = None,
    ) -> None:
        check_module(model)
        check_options(damping, effort)
        self._model, self._mask, self.damping, self.effort = model, check_mask(mask), damping, effort
        self._layers = select_layers(model, layers, transposed=True)
        self._sizes = {name: moment_bytes(layer) for name, layer in self._layers.items()}
        self._parts = [list(self._layers)] if memory is None else parts_within(self._sizes, memory)
        self._generator = torch.Generator().manual_seed(0)
        self._found: dict[str, tuple[Tensor | Path, int]] = {}
        self._files = Files()
        self._open: MomentSums | None = None
        self._own = 0  # batches of this process that are still to be added up
        self.batches = 0

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers."""
        return tuple(self._layers)

    def record(self, batches: Iterable[Any], forward: Forward | None = None) -> Self:
        """Run the model over batches, in evaluation mode and without gradients, and add what its layers receive.

        Args:
            batches: Batches: a `DataLoader`, a list, or anything else that gives the same ones at every pass. In a
                process group each process brings its own, or none.
            forward: Called as ``forward(model, batch)``; by default the model takes a tensor, a tuple of arguments or a
                dict of keyword arguments. Tensors are moved to the model's device before.

        Returns:
            The calibration itself.

        Raises:
            TypeError: If ``batches`` cannot be iterated over, or the model does not take them.
            ValueError: If there are no batches, they can be iterated only once and more passes are needed, a mask has
                another shape than the rows, or a layer received NaN or infinite values.
        """
        if self._open is not None:
            raise ValueError("`record` must follow `gather()` after batches were recorded in your own loop")
        check_forward(batches, forward, passes=len(self._parts))
        with ExitStack() as stack:
            for context in (evaluation(self._model), layer_by_layer(), uncompiled()):
                stack.enter_context(context)
            seen = [self._pass(part, batches, forward) for part in self._parts]
        self.batches += seen[0]
        if self.batches == 0:
            raise ValueError("`batches` must have at least one batch of calibration data, got none")
        if len(set(seen)) > 1:
            raise ValueError(f"`batches` must give the same batches at every pass, got {seen} of them")
        return self

    @contextmanager
    def recording(self, batch: Any) -> Iterator[None]:
        """Context that records the layers' inputs while the model runs, for your own loops.

        In a process group `gather` sums the records of all processes.

        Args:
            batch: The batch that the model runs on, for the mask.

        Yields:
            Nothing.

        Raises:
            ValueError: If ``memory`` does not hold the moments of all layers at a time, which takes several passes.

        Example:
            >>> net = nn.Sequential(nn.Linear(3, 2))
            >>> calibration = Calibration(net)
            >>> x = torch.ones(5, 3)
            >>> with calibration.recording(x):
            ...     loss = net(x).sum()
            >>> calibration.gather().moment("0").rows
            5
        """
        if len(self._parts) > 1:
            raise ValueError(
                f"`memory` must hold the moments of all layers at a time in your own loop, "
                f"{sum(self._sizes.values())} bytes, or pass fewer `layers`; `record` makes several passes"
            )
        if self._open is None:
            self._open = self._sums(self._parts[0])
        with self._hooked(self._open, batch):
            yield
        self._own += 1

    def gather(self) -> Self:
        """Add up what processes recorded in loops of their own; all of them call.

        Returns:
            The calibration itself.

        Raises:
            ValueError: If a layer received NaN or infinite values.
        """
        if len(self._parts) == 1 and (self._open is not None or is_distributed()):  # others may have recorded
            sums, self._open = self._open, None
            own, self._own = self._own, 0
            self.batches += self._close(self._parts[0], sums or self._sums(self._parts[0]), own)
        return self

    def moment(self, name: str) -> InputMoment:
        """The second moment of a layer's inputs.

        Args:
            name: The layer's name.

        Returns:
            The sum over all rows, their number and the damping.

        Raises:
            ValueError: If there is none.
        """
        if self._open is not None:
            raise ValueError("`calibration` must be gathered before it is used; call `gather()` after the last batch")
        if self.batches == 0:
            raise ValueError("`calibration` must have recorded batches; call `record(batches)` first")
        check_text("name", name)
        if name not in self._found:
            near = "".join(f"; did you mean {other!r}?" for other in nearest(name, list(self._layers), limit=1))
            raise ValueError(
                f"`calibration` must be of all layers that are split, but has no layer of the `name` {name!r}{near}"
            )
        total, rows = self._found[name]
        if rows == 0:
            raise ValueError(
                f"`calibration`: {name!r} was never called in {self.batches} batches; leave it out of `layers`"
            )
        return InputMoment(loaded(total), rows, self.damping)

    def state_dict(self) -> dict[str, Any]:
        """All sums, as tensors and primitives; in a process group all processes call."""
        self.gather()
        found = {name: {"total": loaded(total), "rows": rows} for name, (total, rows) in self._found.items()}
        return {"found": found, "batches": self.batches, "generator": self._generator.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ValueError: If it is of other layers.
        """
        found = state_dict["found"]
        if found and set(found) != set(self._layers):
            strange = sorted(set(found) ^ set(self._layers))
            raise ValueError(f"`state_dict` must be of the layers {list(self._layers)}, but differs in {strange}")
        self._open, self._own, self.batches = None, 0, state_dict["batches"]
        self._found = {
            name: (one["total"].to(self._layers[name].weight.device), one["rows"]) for name, one in found.items()
        }
        self._generator.set_state(state_dict["generator"].cpu())

    def _pass(self, part: Sequence[str], batches: Iterable[Any], forward: Forward | None) -> int:
        """One pass over the batches, for some layers; the number of batches, in all processes."""
        sums, count = self._sums(part), 0
        for batch in batches:
            here = placed(batch, next(iter(self._layers.values())).weight.device)
            with self._hooked(sums, here):
                model_pass(self._model, here, forward)
            count += 1
        return self._close(part, sums, count)

    def _sums(self, part: Sequence[str]) -> MomentSums:
        """The sums to continue with. Previous sums are kept on the first process."""
        sums = MomentSums({name: self._layers[name] for name in part}, self.effort)
        first = not is_distributed() or dist.get_rank() == 0
        for name in part if first else ():
            if name in self._found:
                total, rows = self._found.pop(name)
                sums.start(name, loaded(total).clone(), rows)
        return sums

    def _close(self, part: Sequence[str], sums: MomentSums, batches: int) -> int:
        """Keep the sums over all processes."""
        found = sums.result()
        if is_distributed():
            found = {name: over_processes(total, rows) for name, (total, rows) in found.items()}
            device = next(iter(found.values()))[0].device
            batches = int(sum_over_ranks(torch.tensor(float(batches), device=device)))
        bad = [name for name, (total, _) in found.items() if not bool(total.isfinite().all())]
        if bad:
            raise ValueError(
                f"`batches` must give layers finite inputs, but {bad[0]!r} received NaN or infinite values"
            )
        self._found |= found if len(self._parts) == 1 else self._files.keep(found)
        return batches

    @contextmanager
    def _hooked(self, sums: MomentSums, batch: Any) -> Iterator[None]:
        index = RowIndex(mask_of(batch, self._mask), self._generator)

        def hook(name: str) -> Callable[..., None]:
            def add(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                with torch.no_grad():
                    sums.add(name, args[0] if args else next(iter(kwargs.values())), index)

            return add

        handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in sums.layers.items()]
        try:
            yield
            sums.flush()
        finally:
            for handle in handles:
                handle.remove()
