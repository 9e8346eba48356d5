import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from lightning_plugins.functional.stable_rank import (
    exact_gradient,
    followed_term,
    modified_stable_rank,
    nuclear_norm,
    stable_rank,
)
from lightning_plugins.functional.subspace import top_singular_subspace

SHAPES = [(3, 5), (5, 3), (4, 4), (1, 4), (4, 1), (1, 1), (2, 3, 4), (2, 1, 5, 3)]
DEGENERATE = {
    "zeros": torch.zeros(3, 4),
    "ones": torch.ones(5, 3),
    "equal singular values": torch.eye(4),
    "tied pairs": torch.diag(torch.tensor([2.0, 2.0, 1.0, 1.0])),
    "dead rows and columns": torch.nn.functional.pad(torch.ones(2, 2).tril(), (0, 2, 0, 3)),
    "huge": torch.eye(3) * 1e30,
    "tiny": torch.eye(3) * 1e-30,
    "one entry": torch.tensor([[-2.0]]),
    "some of a batch are zeros": torch.stack([torch.zeros(2, 3), torch.ones(2, 3)]),
}
FUNCTIONS = {
    "stable rank": stable_rank,
    "p=1": lambda weight: modified_stable_rank(weight, 2, 1),
    "p=2": lambda weight: modified_stable_rank(weight, 2, 2),
    "nuclear norm": nuclear_norm,
}


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_numpy(name, weight):
    s = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    if name == "nuclear norm":
        return torch.tensor(s.sum(-1))
    rank, p = {"stable rank": (1, 2), "p=1": (2, 1), "p=2": (2, 2)}[name]
    tail = (s[..., rank:] ** p).sum(-1) / (s[..., :rank] ** p).sum(-1)
    return torch.tensor(tail + (name == "stable rank"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_value_is_that_of_the_singular_values(name, shape, dtype):
    weight = random(*shape, dtype=dtype)
    value = FUNCTIONS[name](weight)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value.double(), by_numpy(name, weight), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_first_and_second_derivatives(name, shape):
    weight = random(*shape).requires_grad_()
    assert gradcheck(FUNCTIONS[name], weight)
    assert gradgradcheck(FUNCTIONS[name], weight)


def test_third_derivative_is_refused():
    weight = random(3, 4).requires_grad_()
    for _ in range(2):
        value = modified_stable_rank(weight, 2, 1)
        (first,) = torch.autograd.grad(value, weight, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        second.sum().backward()


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_degenerate_weights_have_finite_derivatives(name, kind):
    weight = DEGENERATE[kind].clone().requires_grad_()
    value = FUNCTIONS[name](weight)
    (first,) = torch.autograd.grad(value.sum(), weight, create_graph=True)
    scale = weight.detach().abs().amax().clamp_min(1e-38)
    (second,) = torch.autograd.grad((first * scale).sum(), weight)
    assert bool(value.isfinite().all())
    assert bool((first * scale).isfinite().all())
    assert bool((second * scale).isfinite().all())


def test_autograd_of_the_definition_fails_where_ours_does_not():
    weight = torch.eye(4, requires_grad=True)
    values = torch.linalg.svd(weight).S
    (plain,) = torch.autograd.grad(values[2:].sum() / values[:2].sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(plain.sum(), weight)
    assert not bool(second.isfinite().all())  # its backward divides by differences of singular values


def test_zeros():
    weight = torch.zeros(2, 3, requires_grad=True)
    assert stable_rank(weight).item() == 1
    assert modified_stable_rank(weight, 1).item() == 0
    for function in FUNCTIONS.values():
        (gradient,) = torch.autograd.grad(function(weight), weight)
        assert not bool(gradient.any())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nonfinite_weight_gives_nan_in_its_place_of_the_batch(name, bad):
    weight = random(2, 3, 4)
    weight[1, 0, 0] = bad
    assert FUNCTIONS[name](weight).isfinite().tolist() == [True, False]


@given(
    m=st.integers(1, 8),
    n=st.integers(1, 8),
    inner=st.integers(1, 8),
    rank=st.integers(1, 9),
    p=st.sampled_from([1, 2]),
    scale=st.floats(1e-9, 1e9),
    seed=st.integers(0, 2**31),
)
def test_bounds_scale_invariance_and_zero_at_the_rank(m, n, inner, rank, p, scale, seed):
    weight = random(m, inner, seed=seed) @ random(inner, n, seed=seed + 1)
    true_rank = min(m, n, inner)
    stable, modified = stable_rank(weight), modified_stable_rank(weight, rank, p)
    assert 1 <= stable <= true_rank + 1e-9
    assert 0 <= modified <= max(min(m, n) / rank - 1, 0) + 1e-9
    if true_rank <= rank:
        assert modified <= (0 if p == 1 else 1e-12)
    else:
        assert modified > 0
    torch.testing.assert_close(stable_rank(weight * scale), stable)
    torch.testing.assert_close(modified_stable_rank(weight * scale, rank, p), modified, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("p", [1, 2])
def test_of_the_rank_itself_it_is_exactly_zero_in_float32(p):
    weight = random(60, 5, dtype=torch.float32) @ random(5, 40, seed=1, dtype=torch.float32)
    assert modified_stable_rank(weight, 5, p) <= (0 if p == 1 else 1e-6)
    assert modified_stable_rank(weight, 4, p) > 0.01


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("shape", [*SHAPES, (6, 40), (40, 6)], ids=str)
def test_closed_form_is_the_gradient_of_autograd(shape, p):
    weight = random(*shape).requires_grad_()
    value = modified_stable_rank(weight, 2, p)
    (expected,) = torch.autograd.grad(value.sum(), weight)
    term = exact_gradient(weight.detach(), 2, p)
    torch.testing.assert_close(term.value, value.detach())
    torch.testing.assert_close(term.gradient, expected)


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("p", [1, 2])
def test_closed_form_is_finite_on_degenerate_weights(p, kind):
    value, gradient = exact_gradient(DEGENERATE[kind], 2, p)
    assert bool(value.isfinite().all())
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("shape", [(48, 200), (200, 48), (2, 30, 60)], ids=str)
@pytest.mark.parametrize("rank", [1, 10])
def test_followed_gradient_stays_within_a_percent(shape, rank):
    weight, start = random(*shape, dtype=torch.float32), None
    start = top_singular_subspace(weight, rank + 8).start
    for step in range(30):
        change = random(*shape, seed=step + 1, dtype=torch.float32)
        weight = weight + 3e-4 * change
        term = followed_term(weight, rank, start)
        start = term.start
        exact = exact_gradient(weight.double(), rank, 2)
        error = torch.linalg.matrix_norm(term.gradient(weight) - exact.gradient) / torch.linalg.matrix_norm(
            exact.gradient
        )
        assert error.max() < 0.01
        torch.testing.assert_close(term.value.double(), exact.value, rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(48, 200), (60, 40)], ids=str)
@pytest.mark.parametrize("rank", [1, 10])
def test_error_of_a_followed_gradient_is_estimated(shape, rank):
    weight = random(*shape)
    start = top_singular_subspace(weight, rank + 8).start
    for change in (3e-2, 1e-2, 3e-3, 1e-3):
        moved = weight + change * random(*shape, seed=1)
        term, exact = followed_term(moved, rank, start), exact_gradient(moved, rank, 2).gradient
        error = float((term.gradient(moved) - exact).norm() / exact.norm())
        assert 0.7 * error < float(term.error) < 5 * error


@pytest.mark.parametrize("weight", [torch.zeros(6, 8), torch.eye(6), torch.ones(6, 8)], ids=["0", "I", "1"])
def test_followed_gradient_is_finite_on_degenerate_weights(weight):
    start = top_singular_subspace(weight, 4).start
    for _ in range(3):
        term = followed_term(weight, 2, start)
        start = term.start
        assert bool(term.value.isfinite())
        assert bool(term.error.isfinite())
        assert bool(term.gradient(weight).isfinite().all())
        torch.testing.assert_close(start.mT @ start, torch.eye(4))


def test_descent_at_p_1_drives_the_tail_to_zero_while_the_head_grows():
    weight = random(8, 12, dtype=torch.float32)
    before = torch.linalg.svdvals(weight)
    for _ in range(400):
        weight = weight - 0.5 * exact_gradient(weight, 3, 1).gradient
    after = torch.linalg.svdvals(weight)
    assert bool((after[:3] > before[:3]).all())
    assert after[3] < 0.01 * after[0]
    assert before[7] > 0.1 * before[0]  # control: there was a tail


def test_autocast_does_not_reach_inside():
    weight = random(8, 12, dtype=torch.float32).requires_grad_()
    expected = modified_stable_rank(weight, 2)
    (gradient,) = torch.autograd.grad(expected, weight)
    with torch.autocast("cpu", torch.bfloat16):
        value = modified_stable_rank(weight, 2)
        (inside,) = torch.autograd.grad(value, weight)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    torch.testing.assert_close(inside, gradient, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: stable_rank(torch.ones(3)), ValueError, r"`weight` must have shape \(\.\.\., m, n\), got \(3,\)"),
        (lambda: stable_rank(torch.ones(0, 3)), ValueError, "at least one row and one column"),
        (lambda: stable_rank(torch.ones(2, 3, dtype=torch.int64)), TypeError, "`weight` must be a floating tensor"),
        (lambda: stable_rank([[1.0]]), TypeError, "`weight` must be a floating tensor, got list"),
        (lambda: modified_stable_rank(torch.ones(2, 3), 0), ValueError, "`rank` must be at least 1, got 0"),
        (lambda: modified_stable_rank(torch.ones(2, 3), 1.0), TypeError, "`rank` must be an int.*did you mean 1"),
        (lambda: modified_stable_rank(torch.ones(2, 3), 1, p=3), ValueError, "`p` must be 1 or 2, got 3"),
        (lambda: modified_stable_rank(torch.ones(2, 3), 1, p=True), ValueError, "`p` must be 1 or 2, got True"),
        (lambda: exact_gradient(torch.ones(2, 3), 1, 0), ValueError, "`p` must be 1 or 2, got 0"),
        (lambda: nuclear_norm(torch.ones(3)), ValueError, "`weight` must have shape"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("seed", range(10))
def test_dead_units_do_not_break_the_decomposition(seed):
    """In float32 LAPACK's own routine returns NaN, or does not converge, for some weights with rows of zeros."""
    generator = torch.Generator().manual_seed(seed)
    alive = torch.rand(50, 40, 1, generator=generator) < 0.5
    left = torch.randn(50, 40, 10, generator=generator) * alive
    left = left * (torch.rand(50, 40, 10, generator=generator) < 0.3)
    weights = left @ torch.randn(50, 10, 40, generator=generator)
    for function in (stable_rank, nuclear_norm, lambda weight: modified_stable_rank(weight, 3)):
        expected = function(weights.double()).float()
        torch.testing.assert_close(function(weights), expected, rtol=1e-3, atol=1e-3)
