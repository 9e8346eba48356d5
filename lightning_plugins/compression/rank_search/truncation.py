"""Weights cut to lower ranks and put back: one decomposition per layer serves every rank that is tried."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from lightning_plugins.compression.low_rank.decomposition import Decomposition, InputMoments
from lightning_plugins.compression.low_rank.transposed import as_linear, stored_weight
from lightning_plugins.compression.networks.arguments import check_moments
from lightning_plugins.weights import Scheme


def energies(modules: Mapping[str, nn.Module], scheme: Scheme, calibration: InputMoments | None = None) -> list[Tensor]:
    """The squared singular values of every layer's weight or outputs, descending, as float64 on the CPU."""
    return [
        _decomposed(name, module, scheme, calibration).values.cpu().double().square()
        for name, module in modules.items()
    ]


class TruncatedWeights:
    """Sets layers to ranks; on leaving the context the weights are the very tensors they were.

    A weight is exchanged as a whole, so nothing is written into the model's own memory. The weights of the ranks in
    use are kept until `forget`.

    Attributes:
        energies: The squared singular values of every layer, descending, as float64 on the CPU.

    Args:
        modules: The layers by name.
        scheme: How a kernel becomes a matrix.
        calibration: What the layers receive; None to truncate the weights by themselves.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], scheme: Scheme, calibration: InputMoments | None = None
    ) -> None:
        self._layers = list(modules.values())
        self._weights = [_finite(name, module) for name, module in modules.items()]
        self._scheme: Scheme = scheme
        self._factors = [_decomposed(name, module, scheme, calibration) for name, module in modules.items()]
        self.energies = [one.values.cpu().double().square() for one in self._factors]
        self._dense = [weight.data for weight in self._weights]
        self._made: dict[tuple[int, int], Tensor] = {}
        self._now = [self._full_rank(layer) for layer in range(len(self._weights))]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for weight, dense in zip(self._weights, self._dense, strict=True):
            weight.data = dense
        self._now = [self._full_rank(layer) for layer in range(len(self._weights))]

    def apply(self, ranks: Sequence[int]) -> None:
        """Set every layer to its rank; the full rank is the weight itself."""
        for layer, (rank, now) in enumerate(zip(ranks, self._now, strict=True)):
            if rank != now:
                self._weights[layer].data = self._at(layer, rank)
                self._now[layer] = rank

    def forget(self, all_but: Iterable[Sequence[int]]) -> None:
        """Free the weights of ranks that are not in these rank vectors."""
        used = {pair for ranks in all_but for pair in enumerate(ranks)}
        self._made = {pair: weight for pair, weight in self._made.items() if pair in used}

    def fingerprint(self) -> str:
        """A checksum of the weights, which two different networks do not share."""
        digest = hashlib.sha256()
        for dense in self._dense:
            digest.update(dense.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _full_rank(self, layer: int) -> int:
        return len(self._factors[layer].values)

    def _at(self, layer: int, rank: int) -> Tensor:
        if rank >= self._full_rank(layer):
            return self._dense[layer]
        if (layer, rank) not in self._made:
            matrix = self._factors[layer].product(rank)
            whole = torch.empty_like(self._dense[layer])  # in the weight's own memory format
            whole.copy_(stored_weight(self._layers[layer], matrix, scheme=self._scheme))
            self._made[layer, rank] = whole
        return self._made[layer, rank]


def _decomposed(name: str, module: nn.Module, scheme: Scheme, calibration: InputMoments | None) -> Decomposition:
    _finite(name, module)
    check_moments(calibration)
    moment = None if calibration is None else calibration.moment(name)
    return Decomposition(as_linear(module).weight, moment, scheme=scheme)


def _finite(name: str, module: nn.Module) -> nn.Parameter:
    weight = module._parameters["weight"]
    if weight is None or not torch.isfinite(weight).all():
        raise ValueError(f"`model`: the weight of {name!r} must be finite, got NaN or infinite entries")
    return weight
