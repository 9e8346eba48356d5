"""All public terms of a loss, found in `lightning_plugins.regularizers`: a new one is in every contract test at once.

A term whose constructor needs arguments has a row in ``ARGUMENTS``; all others are made with their defaults.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins import regularizers
from lightning_plugins.regularizers import EmbeddingTerm

# Directions drawn anew at each step are random, and tests compare: let them stay.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "ModifiedStableRank": {"weight": 1.0, "rank": 2},
    "SIGReg": {"directions": 16, "resample": False},
}
_KINDS = {name: getattr(regularizers, name) for name in regularizers.__all__}
EMBEDDING_TERMS = [
    name for name, kind in _KINDS.items() if issubclass(kind, EmbeddingTerm) and kind is not EmbeddingTerm
]
WEIGHT_TERMS = [name for name, kind in _KINDS.items() if hasattr(kind, "value_and_gradient")]


def make(name: str, **arguments: Any) -> Any:
    """The term of that name; arguments beside those it needs."""
    return _KINDS[name](**{**ARGUMENTS.get(name, {}), **arguments})


def module_of(name: str) -> str:
    """The name of the file that a term stands in."""
    return str(_KINDS[name].__module__.rpartition(".")[2])


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random numbers, the same in every dtype."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradient_of(term: nn.Module, matrix: Tensor) -> Tensor:
    """The gradient of the sum of a term by autograd."""
    leaf = matrix.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(term(leaf).sum(), leaf)
    return gradient
