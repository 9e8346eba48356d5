"""A cap on the spectral norm of weights, kept after every optimizer step."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_plugins._checks import check_choice, check_positive_int, check_positive_number
from lightning_plugins._lightning import Callback, LightningModule, Trainer
from lightning_plugins.callbacks._terms.logged import log_value
from lightning_plugins.callbacks._terms.query_key import QueryKey, select_query_key
from lightning_plugins.callbacks._terms.weight_gradients import scale_rows, shared_out
from lightning_plugins.callbacks._trainer.requirements import (
    makes_layers_late,
    require_supported,
)
from lightning_plugins.distributed import is_distributed
from lightning_plugins.functional.query_key import query_key_norms
from lightning_plugins.functional.subspace import top_singular_subspace
from lightning_plugins.selection import check_layers
from lightning_plugins.weights import WeightMatrix, check_scheme, select_weight_matrices

_VECTORS = 8  # tracked vectors per matrix


class SpectralNormCap(Callback):
    """Scale weights down, after every optimizer step, whose spectral norm is above a maximum.

    A weight above it is multiplied by ``maximum / norm``; all others stay as they are, bit for bit. With
    ``of="query_key"`` the norm is that of the product ``Q.T @ K`` of a head's query and key maps, which bounds its
    attention logits, and both maps (and their biases) are multiplied by the square root of that ratio: the logits of
    that head shrink by it as a whole, the other heads stay ("QK-clip").

    The norm comes from singular vectors tracked from step to step by power iterations: only the first step needs a
    decomposition, and the device is never synchronised. It is never overestimated, so that after steps that turn the
    leading vectors a weight may be above the maximum by a little until the next one.

    Args:
        layers: Dotted name of a layer, a glob over names, or several of them. Among the matches of a glob the linear
            layers, the convolutions and the projections of ``nn.MultiheadAttention`` are taken, each group of a grouped
            convolution for itself; with ``of="query_key"`` the attention layers: ``nn.MultiheadAttention``, those with
            a packed ``qkv`` layer (timm) and those with ``query`` and ``key``, or ``q_proj`` and ``k_proj``
            (transformers).
        maximum: The largest norm that stays, above 0.
        of: ``"weight"`` or ``"query_key"``.
        scheme: How a convolution's kernel becomes a matrix: 1 for ``O x (I * k * k)``, 2 for ``(O * k) x (I * k)``.
        every_n_steps: The cap is kept after every n-th optimizer step.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of the wrong type.

    Logs ``spectral_norm_cap/<layer>``, the largest norm of the layer before it was scaled.

    Example:
        >>> SpectralNormCap("encoder.*", maximum=30.0, of="query_key").of
        'query_key'

    Source:
        Gouk et al., Machine Learning 2021, https://arxiv.org/abs/1804.04368, for the weights; Kimi Team (MuonClip),
        2025, https://arxiv.org/abs/2507.20534, for queries and keys, whose clip goes by the largest logit of a batch:
        the spectral norm, which needs no batch, is our reading.
    """

    def __init__(
        self,
        layers: str | list[str],
        maximum: float,
        *,
        of: Literal["weight", "query_key"] = "weight",
        scheme: Literal[1, 2] = 1,
        every_n_steps: int = 1,
    ) -> None:
        super().__init__()
        self.layers = check_layers(layers, sides=False)
        self.maximum = check_positive_number("maximum", maximum)
        self.of = check_choice("of", of, ("weight", "query_key"))
        self.scheme: Literal[1, 2] = check_scheme(scheme)
        self.every_n_steps = check_positive_int("every_n_steps", every_n_steps)
        self._starts: dict[str, Tensor] = {}  # tracked vectors per matrix
        self._capped_at = 0  # optimizer steps
        self._weights: Sequence[WeightMatrix] = ()
        self._maps: Sequence[QueryKey] = ()

    @property
    def state_key(self) -> str:
        """Unique for every different instance, so that several keep their own entries in a checkpoint."""
        return self._generate_state_key(
            layers=self.layers,
            maximum=self.maximum,
            of=self.of,
            scheme=self.scheme,
            every_n_steps=self.every_n_steps,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module and the Trainer, and find the weights."""
        if stage != "fit":
            return
        require_supported(self, trainer, pl_module)
        if trainer.global_step == 0:  # a new training; a checkpoint's state comes after this hook
            self._starts.clear()
            self._capped_at = 0
        if not makes_layers_late(pl_module):
            self._find(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weights where the module has only now made them."""
        self._find(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the cap if the optimizer has stepped."""
        step = trainer.global_step
        if step == self._capped_at or step // self.every_n_steps == self._capped_at // self.every_n_steps:
            return
        self._capped_at = step
        with torch.no_grad():
            norms = self._cap_weights() if self.of == "weight" else self._cap_maps()
        for label, norm in norms.items():
            log_value(pl_module, f"spectral_norm_cap/{label}", norm.max())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module."""
        self._weights = self._maps = ()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the module: ``teardown`` does not run after an exception."""
        self._weights = self._maps = ()

    def state_dict(self) -> dict[str, Any]:
        """The tracked vectors, and the step at which the cap was last applied."""
        return {"starts": {label: start.clone() for label, start in self._starts.items()}, "capped_at": self._capped_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's vectors."""
        self._starts = dict(state_dict["starts"])
        self._capped_at = state_dict["capped_at"]

    def _find(self, pl_module: LightningModule) -> None:
        if self.of == "weight":
            self._weights = select_weight_matrices(pl_module, self.layers, scheme=self.scheme)
        else:
            self._maps = select_query_key(pl_module, self.layers)

    def _cap_weights(self) -> dict[str, Tensor]:
        found = shared_out(
            self._weights,
            lambda index, matrix: self._norm(self._weights[index].label, matrix),
            lambda index, matrix: _buffers(matrix),
        )
        norms = {}
        for weight, (norm, start) in zip(self._weights, found, strict=True):
            self._starts[weight.label], norms[weight.label] = start, norm
            rows = len(weight.tensor) if weight.rows is None else weight.rows[1] - weight.rows[0]
            factors = self._factors(norm).reshape(-1)  # of each group
            scale_rows(weight.tensor, weight.rows, factors.repeat_interleave(rows // len(factors)))
        return norms

    def _cap_maps(self) -> dict[str, Tensor]:
        norms = {}
        for maps in self._maps:
            query, key = maps.query.heads(maps.number), maps.key.heads(maps.number)
            start = self._starts.get(maps.label)
            found, following = query_key_norms(query, key, None if start is None else start.to(query.device))
            if is_distributed():  # processes of unlike hardware would drift apart by rounding errors
                dist.broadcast(found, 0)
                dist.broadcast(following, 0)
            self._starts[maps.label], norms[maps.label] = following, found
            factors = self._factors(found).sqrt()
            maps.query.scale(factors)
            maps.key.scale(factors)
        return norms

    def _norm(self, label: str, matrix: Tensor) -> tuple[Tensor, Tensor]:
        count = _vectors(matrix)
        start = self._starts.get(label)
        if start is None or start.shape != (*matrix.shape[:-2], min(matrix.shape[-2:]), count):
            found = top_singular_subspace(matrix, count, leading=1)
        else:
            found = top_singular_subspace(matrix, count, start=start.to(matrix.device), leading=1)
        return found.values[..., 0].contiguous(), found.start

    def _factors(self, norms: Tensor) -> Tensor:
        """1 where a norm is at most the maximum, or NaN, which must not spread."""
        return torch.where(norms > self.maximum, self.maximum / norms, 1.0)


def _vectors(matrix: Tensor) -> int:
    rows, columns = matrix.shape[-2:]
    return min(_VECTORS, rows, columns)


def _buffers(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Buffers to receive a norm and its vectors into, on processes that do not compute them."""
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    shape = (*matrix.shape[:-2], min(matrix.shape[-2:]), _vectors(matrix))
    return matrix.new_empty(matrix.shape[:-2], dtype=dtype), matrix.new_empty(shape, dtype=dtype)
