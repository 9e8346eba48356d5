"""A function with inputs, for `numerics`, and shared inputs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A function with inputs.

    Attributes:
        function: Its name in `lightning_plugins.functional`.
        inputs: Makes the inputs, in float64.
        call: Calls it.
        smooth: Whether it has a gradient.
    """

    function: str
    inputs: Callable[[], tuple[Tensor, ...]]
    call: Callable[..., Tensor]
    smooth: bool = True


def rows(n: int, d: int) -> Callable[[], tuple[Tensor]]:
    """Embeddings whose spectrum decays by a factor of ten."""
    return lambda: (torch.randn(n, d, dtype=torch.float64) * torch.linspace(1, 0.1, d, dtype=torch.float64),)


def matrix(m: int, n: int) -> Callable[[], tuple[Tensor]]:
    """Separated singular values, from 1 down to a hundredth."""

    def make() -> tuple[Tensor]:
        u, _, v = torch.linalg.svd(torch.randn(m, n, dtype=torch.float64), full_matrices=False)
        return (u * torch.logspace(0, -2, min(m, n), dtype=torch.float64) @ v,)

    return make


def at_least_float(x: Tensor) -> Tensor:
    """Return rows in a dtype fit for sums of squares: float32 for bfloat16."""
    return x.float() if x.dtype == torch.bfloat16 else x
