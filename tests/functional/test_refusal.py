"""Derivatives that do not exist raise on every way to them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_plugins.functional import gap_precondition
from lightning_plugins.meta.loop.batch_norm import batch_norm


def preconditioned(x: Tensor, **settings: object) -> Tensor:
    return gap_precondition(x, torch.tensor([2.0, 0.5, 0.1], dtype=x.dtype), **settings)


def normalised_gradient(x: Tensor) -> Tensor:
    """A first derivative, as an inner step has it: its own first one exists, and no second one."""
    outputs = batch_norm(x, None, None, 1e-5).square().sum() + batch_norm(x, None, None, 1e-5).pow(3).sum()
    (gradient,) = torch.autograd.grad(outputs, x, create_graph=True)
    return gradient


CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": preconditioned,
    "exact": lambda x: preconditioned(x, derivative="exact"),
    "rank": lambda x: preconditioned(x, rank=2),
    "tall": lambda x: preconditioned(x.mT),
    "batch norm": normalised_gradient,
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("weight", [1.0, None])  # a constant gradient that comes in, and one that depends on x
def test_one_derivative_more_is_refused(name: str, weight: float | None):
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    result = CASES[name](x)
    value = result.sum() if weight else result.square().sum()
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    assert gradient.isfinite().all()
    for further in (
        lambda: torch.autograd.grad(gradient.sum(), x, retain_graph=True),
        lambda: gradient.sum().backward(),
    ):
        with pytest.raises(RuntimeError, match="cannot be differentiated once more"):
            further()


def test_approximate_gap_has_all_derivatives():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: preconditioned(x, approximate=True).sin(), x)
