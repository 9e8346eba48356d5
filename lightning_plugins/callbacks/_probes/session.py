"""The probes of one run: hooks on the module, sums by stage, and controls."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_plugins._checks import shown
from lightning_plugins._lightning import MisconfigurationException, rank_zero_warn
from lightning_plugins.callbacks._probes.batches import first_input
from lightning_plugins.callbacks._probes.capture import CopyingCapture
from lightning_plugins.callbacks._probes.controls import InitialNetwork, NetworkCalls, random_projection
from lightning_plugins.callbacks._probes.probes import LayerProbes, make_probe
from lightning_plugins.callbacks._probes.rows import BatchRows, RowSelection
from lightning_plugins.metrics import ProbeResult


def check_options(probe: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return arguments of `LinearProbe`, as a probe would take them.

    Raises:
        TypeError: If they are no mapping, or one is unknown or of the wrong type.
        ValueError: If one is out of its range.
    """
    if probe is not None and not isinstance(probe, Mapping):
        raise TypeError(f"`probe` must map arguments of LinearProbe to values, got {type(probe).__name__}")
    options = dict(probe or {})
    if not all(isinstance(name, str) for name in options):
        raise TypeError(f"`probe` must map names of arguments of LinearProbe to values, got {shown(probe)}")
    if "num_features" in options:
        raise ValueError("`probe` must leave out 'num_features', which the layers determine")
    try:
        make_probe(1, options)
    except TypeError as error:
        if "unexpected keyword" in str(error):
            raise TypeError(f"`probe`: {str(error).replace('LinearProbe.__init__()', 'LinearProbe')}") from None
        raise
    return options


@dataclass(frozen=True)
class ControlSettings:
    """Controls that run along with the probes.

    Attributes:
        names: Out of ``"initial"`` and ``"projection"``.
        context: Makes the context in which the module's steps run, such as autocast.
    """

    names: tuple[str, ...] = ()
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


class ProbeSession:
    """Hooks on a module, and probes of the captured tensors.

    Args:
        module: The module.
        layers: Names, globs and sides.
        rows: Which rows of a layer, with which targets and groups.
        options: Arguments of `LinearProbe`.
        stages: Names under which rows are summed.
        controls: Which controls, and how they run.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[str],
        rows: RowSelection,
        options: Mapping[str, Any],
        stages: Sequence[str],
        controls: ControlSettings | None = None,
    ) -> None:
        self.batch: Any = None
        self._layers, self._rows, self._options = layers, rows, options
        self._stages, self._controls = tuple(stages), controls or ControlSettings()
        self._capture = CopyingCapture(module, layers, needs_gradient=False)
        self._calls: NetworkCalls | None = None
        if "initial" in self._controls.names:
            self._calls = NetworkCalls(module, self._capture.names)
        self._capture.attach()
        self._initial: InitialNetwork | None = None
        self._probes: dict[str, LayerProbes] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Capture inside this context."""
        with ExitStack() as contexts:
            contexts.enter_context(self._capture.recording())
            if self._calls is not None:
                contexts.enter_context(self._calls.recording())
            yield

    def begin(self, weights: dict[str, Tensor] | None, *, new: bool = True) -> dict[str, Tensor] | None:
        """Make the copy of the network at its initial weights, if that is wanted.

        Args:
            weights: Those of an earlier beginning, or None.
            new: Whether this is a beginning, for want of an earlier one.

        Returns:
            The weights of the beginning.

        Raises:
            MisconfigurationException: If the weights of the beginning are not known.
        """
        if self._calls is None or self._initial is not None:
            return weights
        if weights is None and not new:
            raise MisconfigurationException(
                "`controls`: 'initial' needs the weights that a training began with, and this callback has seen none; "
                "leave 'initial' out, or pass the callback that the training had"
            )
        self._initial = InitialNetwork(self._calls, weights, self._layers)
        return self._initial.weights() if weights is None else weights

    @torch.no_grad()
    def add(self, stage: str) -> None:
        """Add the rows of the recorded batch to the sums of a stage."""
        device_type = next(
            (tensor.device.type for tensor in tree_leaves(self.batch) if isinstance(tensor, Tensor)), "cpu"
        )
        with torch.autocast(device_type, enabled=False):  # sums and projections are not for half precision
            self._add(stage)

    def _add(self, stage: str) -> None:
        captured = self._capture.take()
        calls = self._calls.take() if self._calls is not None else []
        of_batch = self._rows.of_batch(self.batch)
        probes = self._probes.setdefault(stage, LayerProbes(self._options))
        if self._initial is not None:
            answers = self._initial.answer(calls, self._controls.context)
            captured.update({f"{label}@initial": tensors for label, tensors in answers.items()})
        width = 0
        for label, tensors in captured.items():
            for tensor in tensors:
                picked = self._pick(label, tensor, of_batch)
                width = max(width, picked[0].shape[-1])
                probes.update(label, *picked)
        if "projection" in self._controls.names and width:
            projected = random_projection(first_input(self.batch), width, seed=0)
            probes.update("projection", *self._pick("projection", projected, of_batch))
        self.batch = None

    def results(self, stage: str, device: torch.device, *, strict: bool = False) -> dict[str, ProbeResult]:
        """Fit the probes of a stage and forget its rows.

        Args:
            stage: Name of the stage.
            device: Where this process's tensors are.
            strict: Whether rows that allow no fit are an error; else there is a warning.

        Returns:
            What was found, by layer.

        Raises:
            ValueError: If the rows of a layer allow no fit, under ``strict``.
        """
        probes = self._probes.setdefault(stage, LayerProbes(self._options))
        found, failed = probes.results(self._labels(), device)
        probes.reset()
        for label, reason in failed.items():
            if strict:
                raise ValueError(f"`layers`: {label!r}: {reason}")
            rank_zero_warn(f"the probe of {label!r} was not fitted: {reason}")
        return found

    def state(self) -> dict[str, Any]:
        """The sums of this process, of stages that have any."""
        return {stage: state for stage, probes in self._probes.items() if (state := probes.state())}

    def state_of_all(self, device: torch.device) -> dict[str, Any]:
        """The sums of all processes, which must all ask at the same time."""
        states = {}
        for stage in self._stages:  # in the same order in every process, also where only others have rows
            probes = self._probes.setdefault(stage, LayerProbes(self._options))
            states[stage] = probes.state_of_all(self._labels(), device)
        return {stage: state for stage, state in states.items() if state}

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from the sums in ``state``."""
        for stage, sums in state.items():
            self._probes.setdefault(stage, LayerProbes(self._options)).load_state(sums, device)

    def detach(self) -> None:
        """Remove the hooks."""
        self._capture.detach()
        if self._calls is not None:
            self._calls.detach()

    def _labels(self) -> list[str]:
        """All that is probed, in the same order in every process."""
        layers = self._capture.labels
        initial = [f"{label}@initial" for label in layers] if "initial" in self._controls.names else []
        return [*layers, *initial, *(["projection"] if "projection" in self._controls.names else [])]

    def _pick(self, label: str, tensor: Tensor, of_batch: BatchRows) -> tuple[Tensor, Tensor, Tensor]:
        try:
            return self._rows.pick(tensor, of_batch)
        except (TypeError, ValueError) as error:
            raise type(error)(f"`layers`: {label!r}: {error}") from error
