"""Derivatives that do not exist are refused on every way to them; those that do are right on every way."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_plugins
from lightning_plugins.compression.gates.masked_weight import _Scaled
from lightning_plugins.compression.gates.threshold_function import Values
from lightning_plugins.functional import (
    gap_precondition,
    modified_stable_rank,
    nuclear_norm,
    polar_factor,
    singular_value_threshold,
    stable_rank,
    straight_through,
    von_neumann_entropy,
)
from lightning_plugins.functional.derivatives import last_derivative, refuse_derivatives
from lightning_plugins.meta.loop.batch_norm import batch_norm

W = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
GAINS = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def spectral(wide: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((wide @ wide.mT).detach())
    return Values.apply(wide, None, vectors, values.clamp_min(0).sqrt())


ONCE = {
    "threshold": (lambda w: singular_value_threshold(w, 0.5), (W,)),
    "threshold, by its height": (lambda t: singular_value_threshold(W, t), (torch.tensor(0.5).double(),)),
    "polar factor": (polar_factor, (W,)),
    "gains": (gap_precondition, (W, GAINS)),
    "gains, gradient alone": (lambda w: gap_precondition(w, GAINS), (W,)),
    "gains alone": (lambda g: gap_precondition(W, g) * g.sum(), (GAINS,)),
    "values of a threshold": (spectral, (W,)),
}
TWICE = {
    "entropy": (von_neumann_entropy, (W,)),
    "entropy by products": (lambda w: von_neumann_entropy(w, method="products"), (W,)),
    "stable rank": (stable_rank, (W,)),
    "modified stable rank": (lambda w: modified_stable_rank(w, 2), (W,)),
    "nuclear norm": (nuclear_norm, (W,)),
}


def differentiated(fn: Any, inputs: tuple[Tensor, ...], order: int, way: str) -> Any:
    """A derivative of some order, the last one by ``.backward()`` or by ``torch.autograd.grad``."""
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    value = (fn(*inputs) ** 2).sum()
    for _ in range(order - 1):
        value = sum((g**2).sum() for g in torch.autograd.grad(value, inputs, create_graph=True))
    if way == "backward":
        value.backward()
        return [x.grad for x in inputs]
    return torch.autograd.grad(value, inputs)


@pytest.mark.parametrize("way", ["backward", "grad"])
@pytest.mark.parametrize("case", ONCE)
def test_a_second_derivative_is_refused_on_both_ways(case: str, way: str):
    fn, inputs = ONCE[case]
    assert all(g.isfinite().all() for g in differentiated(fn, inputs, 1, way))
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        differentiated(fn, inputs, 2, way)


@pytest.mark.parametrize("way", ["backward", "grad"])
@pytest.mark.parametrize("case", TWICE)
def test_a_third_derivative_is_refused_on_both_ways(case: str, way: str):
    fn, inputs = TWICE[case]
    assert all(g.isfinite().all() for g in differentiated(fn, inputs, 2, way))
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        differentiated(fn, inputs, 3, way)


def test_the_derivative_of_a_gradient_with_respect_to_something_else_is_right():
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    weight = W.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scale * singular_value_threshold(weight, 0.5).sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(gradient.sum(), scale)


@pytest.mark.parametrize(
    ("fn", "inputs"),
    [
        (lambda w, s: _Scaled.apply(w, s, 0), (W, torch.rand(4, dtype=torch.float64))),
        (lambda w, s: _Scaled.apply(w, s, 1), (W, torch.rand(6, dtype=torch.float64))),
        (lambda w, s: _Scaled.apply(w, s, 0), (GAINS, torch.rand(4, dtype=torch.float64))),
    ],
    ids=["rows", "columns", "a vector"],
)
def test_masked_weights_can_be_differentiated_twice(fn: Any, inputs: tuple[Tensor, ...]):
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(fn, inputs)
    assert torch.autograd.gradgradcheck(fn, inputs)


def test_a_straight_through_gradient_has_the_derivative_of_its_formula():
    scores = torch.linspace(-1, 1, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(straight_through(scores, 5.0).sum(), scores, create_graph=True)
    soft = torch.sigmoid(5 * scores)
    (expected,) = torch.autograd.grad((5 * soft * (1 - soft)).sum(), scores)
    torch.testing.assert_close(torch.autograd.grad(gradient.sum(), scores)[0], expected)


def test_under_transforms_too():
    gradient = torch.func.grad(lambda w: (singular_value_threshold(w, 0.5) ** 2).sum())
    assert torch.func.vmap(gradient)(torch.stack([W, 2 * W])).shape == (2, 4, 6)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.func.grad(lambda w: (gradient(w) ** 2).sum())(W)


def test_torchs_own_decorator_is_used_nowhere():
    for path in Path(lightning_plugins.__file__).parent.rglob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert "once_differentiable" not in names, path


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @last_derivative
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def test_a_penalty_on_gradients_is_refused_where_another_path_has_a_graph():
    layer = nn.Linear(3, 3).double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    out = Squared.apply(layer(x)).sum() + (layer(x) ** 3).sum()
    (gradient,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(gradient.square().sum(), list(layer.parameters()), allow_unused=True)


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
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            further()


def test_approximate_gap_has_all_derivatives():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: preconditioned(x, approximate=True).sin(), x)


def test_the_message_says_what_and_what_to_do_instead():
    x = torch.ones(3, requires_grad=True)
    first, none = refuse_derivatives((x.detach() * 2, None), (x,), "`f`: the gradient")
    assert none is None
    torch.testing.assert_close(first.detach(), torch.full((3,), 2.0))
    with pytest.raises(RuntimeError, match=r"^`f`: the gradient cannot be differentiated again; look in"):
        first.sum().backward()


def test_nothing_is_tied_where_no_derivative_can_be_asked_for():
    x, result = torch.ones(3, requires_grad=True), torch.ones(3)
    assert refuse_derivatives((result,), (x.detach(),), "it")[0] is result
    with torch.no_grad():
        assert refuse_derivatives((result,), (x,), "it")[0] is result
