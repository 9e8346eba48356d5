import math

import pytest
import torch
from torch.autograd import gradcheck

from lightning_plugins.functional.singular_values import polar_factor, singular_value_threshold

SHAPES = [(3, 5), (5, 3), (4, 4), (1, 4), (4, 1), (2, 3, 4), (2, 1, 5, 3)]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_values(values, m=4, n=6, dtype=torch.float64):
    left, right = torch.linalg.qr(random(m, m))[0], torch.linalg.qr(random(n, n, seed=1))[0]
    values = torch.tensor(values, dtype=torch.float64)
    return ((left[:, : len(values)] * values) @ right[: len(values)]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.5, 100.0])
def test_threshold_lowers_the_singular_values(shape, dtype, threshold):
    weight = random(*shape, dtype=dtype)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    expected = (u * (s - threshold).clamp_min(0)[..., None, :]) @ v
    torch.testing.assert_close(singular_value_threshold(weight, threshold), expected.to(dtype), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "threshold", "accuracy"), [([1, 0.1, 3e-3], 1e-3, 4e-6), ([1, 1e-3, 5e-5], 2e-5, 3e-4)]
)
def test_threshold_is_as_accurate_as_stated_in_float32(values, threshold, accuracy):
    lowered = singular_value_threshold(with_values(values, dtype=torch.float32), threshold)
    expected = with_values([value - threshold for value in values])
    torch.testing.assert_close(lowered.double(), expected, rtol=0, atol=accuracy)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["one threshold", "one a matrix"])
def test_threshold_gradients(shape, shared):
    weight = random(*shape).requires_grad_()
    threshold = torch.full(() if shared else shape[:-2], 0.7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(singular_value_threshold, (weight, threshold))


@pytest.mark.parametrize(
    "values",
    [[2, 2, 2, 2], [2, 2, 1, 1], [3, 2], [3, 2, 2, 0], [3, 0.2, 0.1, 0.1], [1, 0.9999999, 0.99999, 0.5]],
    ids=str,
)
def test_threshold_gradient_with_equal_and_vanishing_singular_values(values):
    weight = with_values(values).requires_grad_()
    threshold = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(singular_value_threshold, (weight, threshold))


def test_autograd_of_the_definition_fails_at_equal_singular_values():
    weight = torch.eye(3, dtype=torch.float64, requires_grad=True)
    u, s, v = torch.linalg.svd(weight)
    (plain,) = torch.autograd.grad((((u * (s - 0.5)) @ v) * random(3, 3)).sum(), weight)
    (ours,) = torch.autograd.grad((singular_value_threshold(weight, 0.5) * random(3, 3)).sum(), weight)
    assert not bool(plain.isfinite().all())
    assert bool(ours.isfinite().all())


@pytest.mark.parametrize("weight", [torch.zeros(3, 4), torch.ones(5, 3), torch.eye(3) * 1e30], ids=["0", "1", "huge"])
@pytest.mark.parametrize("function", [lambda w: singular_value_threshold(w, 0.5), polar_factor], ids=["svt", "polar"])
def test_degenerate_weights_have_finite_gradients(function, weight):
    weight = weight.clone().requires_grad_()
    value = function(weight)
    (gradient,) = torch.autograd.grad(value.sum(), weight)
    assert bool(value.isfinite().all())
    assert bool(gradient.isfinite().all())


def test_second_derivative_is_refused():
    weight = random(3, 4).requires_grad_()
    for function in (lambda w: singular_value_threshold(w, 0.5), polar_factor):
        (gradient,) = torch.autograd.grad(function(weight).square().sum(), weight, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated again"):
            gradient.sum().backward()


@pytest.mark.parametrize("method", ["auto", "eigh", "products"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_polar_factor_has_singular_values_of_one(shape, method):
    weight = random(*shape)
    u, _, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(polar_factor(weight, method=method), u @ v, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("least", "dtype"), [(2e-3, torch.float32), (2e-4, torch.float64)], ids=str)
def test_polar_factor_by_products_is_as_accurate_as_stated(least, dtype):
    factor = polar_factor(with_values([1.0, 0.01, least, 0.0], dtype=dtype), method="products")
    assert torch.linalg.matrix_norm(factor.double() - with_values([1, 1, 1]), ord=2) < 2e-3
    assert torch.linalg.svdvals(factor).max() < 1 + 1e-5


def test_polar_factor_by_eigh_leaves_rounding_errors_out():
    weight = with_values([1.0, 0.1, 0.0, 0.0], dtype=torch.float32)
    torch.testing.assert_close(polar_factor(weight).double(), with_values([1, 1]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", ["eigh", "products"])
def test_polar_factor_gradient(shape, method):
    weight = random(*shape).requires_grad_()
    assert gradcheck(lambda w: polar_factor(w, method=method), weight, atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_weight_gives_nan_in_its_place_of_the_batch(bad):
    weight = random(2, 3, 4)
    weight[1, 0, 0] = bad
    for method in ("eigh", "products"):
        assert polar_factor(weight, method=method).isfinite().all(-1).all(-1).tolist() == [True, False]
    assert singular_value_threshold(weight, 0.5).isfinite().all(-1).all(-1).tolist() == [True, False]


def test_batches_under_vmap():
    weight, threshold = random(3, 4, 5), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    mapped = torch.func.vmap(singular_value_threshold)(weight, threshold)
    torch.testing.assert_close(mapped, singular_value_threshold(weight, threshold))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: singular_value_threshold(torch.ones(3), 0.1), ValueError, "`weight` must have shape"),
        (lambda: singular_value_threshold(torch.ones(2, 2), -0.1), ValueError, "`threshold` must be at least 0"),
        (lambda: singular_value_threshold(torch.ones(2, 2), math.nan), ValueError, "`threshold` must be finite"),
        (lambda: singular_value_threshold(torch.ones(2, 2), "1"), TypeError, "`threshold` must be a number"),
        (lambda: singular_value_threshold(torch.ones(2, 2), torch.tensor(1)), TypeError, "`threshold` must be a float"),
        (lambda: polar_factor(torch.ones(2, 2), method="product"), ValueError, "did you mean 'products'"),
        (lambda: polar_factor(torch.ones(0, 2)), ValueError, "at least one row"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-12, 1e-9, 1e-7, 1e-5])
@pytest.mark.parametrize(
    "function", [lambda w: singular_value_threshold(w, 0.5), polar_factor], ids=["threshold", "polar factor"]
)
def test_gradient_at_a_near_tie_is_the_slope_along_any_direction(function, gap):
    """The maps are smooth where singular values meet; a quotient of two rounding errors is not their slope."""
    weight = with_values([2.0, 2.0 - gap, 1.0]).requires_grad_()
    upstream, direction, step = random(4, 6, seed=5), random(4, 6, seed=6), 1e-5
    if function is polar_factor:  # singular values of zero have no polar factor: stay within the span
        inside = with_values([1.0, 1.0, 1.0])
        direction = inside @ inside.mT @ direction @ inside.mT @ inside
    (gradient,) = torch.autograd.grad(function(weight), weight, upstream)
    with torch.no_grad():
        higher, lower = (function(weight + sign * step * direction) for sign in (1, -1))
    slope = ((higher - lower) * upstream).sum() / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-7)
