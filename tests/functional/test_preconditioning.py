import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.func import grad, vmap

from lightning_plugins.functional.preconditioning import gap_precondition

SHAPES = [(3, 5), (5, 3), (4, 4), (1, 6), (6, 1), (1, 1), (2, 3, 5), (2, 3, 5, 2)]
DERIVATIVES = ["constant", "exact"]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spread_gains(*shape, seed=5, dtype=torch.float64):
    return 0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_values(values, m, n):
    """A matrix with these singular values."""
    left, right = torch.linalg.qr(random(m, m))[0], torch.linalg.qr(random(n, n, seed=1))[0]
    values = torch.tensor(values, dtype=torch.float64)
    return (left[:, : len(values)] * values) @ right[: len(values)]


def reference(gradient, gains):
    u, s, v = torch.linalg.svd(gradient.detach(), full_matrices=False)
    return (u * (gains * s)[..., None, :]) @ v


def published(gradient, gains):
    """The published update: a projection from the decomposition of the detached gradient, times the gradient."""
    u = torch.linalg.svd(gradient.detach(), full_matrices=False)[0]
    return u @ torch.diag_embed(gains) @ u.mT @ gradient


def gradients(function, gradient, gains):
    gradient, gains = gradient.clone().requires_grad_(), gains.clone().requires_grad_()
    result = function(gradient, gains)
    return torch.autograd.grad((result * random(*result.shape, seed=9)).sum(), (gradient, gains))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_is_that_of_the_decomposition(shape, dtype):
    gradient, gains = random(*shape, dtype=dtype), spread_gains(min(shape[-2:]), dtype=dtype)
    expected = reference(gradient.double(), gains.double()).to(dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    for derivative in DERIVATIVES:
        result = gap_precondition(gradient, gains, derivative=derivative)
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_constant_derivative_is_the_published_one(shape):
    gradient, gains = random(*shape), spread_gains(*shape[:-2], min(shape[-2:]))
    torch.testing.assert_close(gradients(gap_precondition, gradient, gains), gradients(published, gradient, gains))


@pytest.mark.parametrize(("m", "n"), [(3, 5), (5, 3), (4, 4), (1, 6), (6, 1), (1, 1)])
def test_exact_derivative_is_that_of_the_value(m, n):
    gradient = with_values([4.0, 2.5, 1.2, 0.5][: min(m, n)], m, n).requires_grad_()
    gains = torch.tensor([1.5, 0.6, 1.3, 0.5], dtype=torch.float64)[: min(m, n)].requires_grad_()
    assert gradcheck(lambda g, m: gap_precondition(g, m, derivative="exact"), (gradient, gains))


def test_exact_derivative_of_a_batch_with_one_set_of_gains_each():
    gradient = torch.stack([with_values([3.0, 2.0, 1.0], 3, 4), with_values([1.0, 0.6, 0.2], 3, 4)]).requires_grad_()
    gains = spread_gains(2, 3).requires_grad_()
    assert gradcheck(lambda g, m: gap_precondition(g, m, derivative="exact"), (gradient, gains))


def test_constant_derivative_is_not_that_of_the_value():
    gradient, gains = with_values([3.0, 2.0, 1.0], 3, 4), torch.tensor([1.5, 0.7, 1.1], dtype=torch.float64)
    exact = gradients(lambda g, m: gap_precondition(g, m, derivative="exact"), gradient, gains)
    constant = gradients(gap_precondition, gradient, gains)
    assert (exact[0] - constant[0]).norm() > 0.1 * exact[0].norm()
    torch.testing.assert_close(exact[1], constant[1])


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gains_of_one_are_the_identity(shape, derivative):
    gradient, gains = random(*shape, dtype=torch.float32), torch.ones(min(shape[-2:]))
    result = gap_precondition(gradient, gains, derivative=derivative)
    torch.testing.assert_close(result, gradient, rtol=0, atol=0)
    if derivative == "exact" or shape[-2] <= shape[-1]:  # else the published projection loses what is outside of U
        upstream = random(*shape, seed=9, dtype=torch.float32)
        leaf = gradient.clone().requires_grad_()
        (back,) = torch.autograd.grad(gap_precondition(leaf, gains, derivative=derivative), leaf, upstream)
        torch.testing.assert_close(back, upstream, rtol=1e-5, atol=1e-5)


def of_rank(rank, m, n, seed=0):
    """Factors whose product is a matrix of this rank."""
    return random(rank, m, seed=seed), random(rank, n, seed=seed + 1)


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7), (1, 4), (4, 1)], ids=str)
def test_bound_on_the_rank_changes_nothing_below_it(shape, derivative):
    factors, gains = of_rank(min(3, *shape), *shape), spread_gains(min(shape))
    gains[3:] = 1  # the derivative of a changing rank takes the others

    def derivatives(rank):
        leaves = [factor.clone().requires_grad_() for factor in (*factors, gains)]
        result = gap_precondition(leaves[0].mT @ leaves[1], leaves[2], derivative=derivative, rank=rank)
        return result, *torch.autograd.grad((result * random(*shape, seed=9)).sum(), leaves)

    expected = derivatives(None)
    for rank in (3, 4, 100):
        torch.testing.assert_close(derivatives(rank), expected, rtol=1e-6, atol=1e-9)


def test_exact_derivative_with_a_bound_on_the_rank():
    left, right = (factor.requires_grad_() for factor in of_rank(2, 5, 6))
    gains = torch.tensor([1.7, 0.4, 0.9, 0.1, 2.0], dtype=torch.float64).requires_grad_()
    assert gradcheck(
        lambda a, b, m: gap_precondition(a.mT @ b, m, derivative="exact", rank=2), (left, right, gains), atol=1e-6
    )


def test_bound_on_the_rank_with_dead_units_and_tasks():
    left, right = random(4, 3, 8), random(4, 3, 7, seed=1)
    left[:, :, 2:5] = 0
    left[1, 1:] = 0  # one rank
    left[2] = 0
    gains = spread_gains(7)
    gradient = left.mT @ right
    bounded = vmap(lambda g: gap_precondition(g, gains, rank=3))(gradient)
    torch.testing.assert_close(bounded, reference(gradient, gains), rtol=1e-9, atol=1e-9)


def test_first_gain_belongs_to_the_largest_singular_value():
    gradient = torch.diag(torch.tensor([1.0, 5.0, 3.0]))
    expected = torch.diag(torch.tensor([1.0, 50.0, 6.0]))
    torch.testing.assert_close(gap_precondition(gradient, torch.tensor([10.0, 2.0, 1.0])), expected)


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("shape", [(3, 5), (5, 3)], ids=str)
def test_vmap_is_a_loop(shape, derivative):
    batch, gains = random(4, *shape), spread_gains(3)

    def total(gradient, gains):
        return gap_precondition(gradient, gains, derivative=derivative).pow(3).sum()

    mapped = vmap(grad(total, argnums=(0, 1)), in_dims=(0, None))(batch, gains)
    looped = [grad(total, argnums=(0, 1))(gradient, gains) for gradient in batch]
    for together, single in zip(mapped, zip(*looped, strict=True), strict=True):
        torch.testing.assert_close(together, torch.stack(single))
    leaf = gains.clone().requires_grad_()
    vmap(total, in_dims=(0, None))(batch, leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, mapped[1].sum(0))


def degenerate(m, n):
    lonely = torch.zeros(m, n, dtype=torch.float64)
    lonely[0, 0] = 1
    return {
        "zero": torch.zeros(m, n, dtype=torch.float64),
        "equal": with_values([2.0] * min(m, n), m, n),
        "one rank": random(m, 1) @ random(1, n),
        "duplicated": random(1, n).expand(m, n),
        "one entry": lonely,
        "huge": 1e180 * random(m, n),
        "tiny": 1e-180 * random(m, n),
        "near tie": with_values([2.0, 2.0 - 1e-12, 1.0][: min(m, n)], m, n),
    }


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("kind", list(degenerate(1, 1)))
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (3, 3), (1, 4), (4, 1), (1, 1)], ids=str)
def test_degenerate_gradients_are_finite_and_bounded(shape, kind, derivative):
    gradient, gains = degenerate(*shape)[kind], spread_gains(min(shape))
    for dtype in (torch.float64, torch.float32):
        if dtype == torch.float32 and kind in {"huge", "tiny"}:
            gradient = gradient * (1e-150 if kind == "huge" else 1e150)
        matrix = gradient.to(dtype).requires_grad_()
        factors = gains.to(dtype).requires_grad_()
        result = gap_precondition(matrix, factors, derivative=derivative)
        upstream = random(*shape, seed=9, dtype=dtype)
        back, back_gains = torch.autograd.grad(result, (matrix, factors), upstream)
        assert result.isfinite().all()
        assert back_gains.isfinite().all()
        assert back.norm() < 1e3 * upstream.norm()
        largest = matrix.detach().abs().max().double()
        largest = 1 if largest == 0 else largest
        before, after = (torch.linalg.matrix_norm(x.detach() / largest, ord=2) for x in (matrix, result))
        assert after <= gains.max() * before * (1 + 1e-5)


@pytest.mark.parametrize("seed", [5, 25, 59])
def test_dead_units_do_not_break_the_decomposition(seed):
    """In float32 the one of MKL returns NaN, or does not converge, for one or two of these Gram matrices."""
    generator = torch.Generator().manual_seed(seed)
    alive = torch.rand(50, 40, 1, generator=generator) < 0.5
    deltas = torch.randn(50, 40, 10, generator=generator) * alive * (torch.rand(50, 40, 10, generator=generator) < 0.3)
    inputs = torch.randn(50, 10, 1, generator=generator) * torch.randn(50, 1, 40, generator=generator)
    gradient, gains = deltas @ (inputs + 0.1).relu(), spread_gains(40, dtype=torch.float32)
    expected = reference(gradient.double(), gains.double()).float()
    torch.testing.assert_close(gap_precondition(gradient, gains), expected, rtol=1e-4, atol=1e-4)


def test_small_singular_values_keep_their_gains_in_float32():
    gradient = with_values([1.0, 1e-4, 3e-5], 3, 5).float()
    gains = torch.tensor([1.0, 10.0, 100.0])
    expected = with_values([1.0, 1e-3, 3e-3], 3, 5).float()
    torch.testing.assert_close(gap_precondition(gradient, gains), expected, rtol=0, atol=2e-5)


def test_what_is_not_finite_stays_visible_and_alone():
    gradient = random(3, 2, 4)
    gradient[1, 0, 0] = torch.inf
    result = gap_precondition(gradient, spread_gains(2))
    assert result[1].isnan().all()
    torch.testing.assert_close(result[[0, 2]], reference(gradient[[0, 2]], spread_gains(2)))


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (4, 3, 2)], ids=str)
def test_approximate_scales_the_smaller_side(shape):
    gradient, gains = random(*shape).requires_grad_(), spread_gains(2).requires_grad_()
    expected = torch.diag(gains) @ gradient if shape[-2] < shape[-1] else gradient @ torch.diag(gains)
    torch.testing.assert_close(gap_precondition(gradient, gains, approximate=True), expected)
    assert gradcheck(lambda g, m: gap_precondition(g, m, approximate=True), (gradient, gains))


@pytest.mark.parametrize("approximate", [True, False])
def test_half_precision_is_computed_in_float32(approximate):
    gradient, gains = random(3, 4, dtype=torch.bfloat16), spread_gains(3, dtype=torch.float32)
    expected = gap_precondition(gradient.float(), gains, approximate=approximate)
    with torch.autocast("cpu", torch.bfloat16):
        result = gap_precondition(gradient, gains, approximate=approximate)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_autocast_is_off_in_the_backward():
    gradient, gains = random(3, 4, dtype=torch.float32).requires_grad_(), spread_gains(3, dtype=torch.float32)
    for derivative in DERIVATIVES:
        result = gap_precondition(gradient, gains, derivative=derivative).square().sum()
        (expected,) = torch.autograd.grad(result, gradient, retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            (within,) = torch.autograd.grad(result, gradient)
        torch.testing.assert_close(within, expected, rtol=0, atol=0)


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_second_derivative_is_refused(derivative):
    gradient, gains = random(3, 4).requires_grad_(), spread_gains(3)
    total = gap_precondition(gradient, gains, derivative=derivative).pow(3).sum()
    (first,) = torch.autograd.grad(total, gradient, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        first.sum().backward()


@given(m=st.integers(1, 6), n=st.integers(1, 6), seed=st.integers(0, 2**31), scale=st.floats(1e-6, 1e6))
def test_turns_and_scales_with_the_gradient(m, n, seed, scale):
    gradient, gains = random(m, n, seed=seed), spread_gains(min(m, n), seed=seed)
    left, right = torch.linalg.qr(random(m, m, seed=seed + 1))[0], torch.linalg.qr(random(n, n, seed=seed + 2))[0]
    result = gap_precondition(gradient, gains)
    turned = gap_precondition(left @ gradient @ right, gains)
    torch.testing.assert_close(turned, left @ result @ right, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(gap_precondition(scale * gradient, gains), scale * result, rtol=1e-5, atol=1e-8 * scale)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gap_precondition([1.0], torch.ones(1)), TypeError, "`gradient` must be a floating tensor, got list"),
        (lambda: gap_precondition(torch.ones(2, 2), torch.ones(2).long()), TypeError, r"`gains`.*`gains.float\(\)`"),
        (lambda: gap_precondition(torch.ones(3), torch.ones(1)), ValueError, r"`gradient`.*a bias takes no gains"),
        (lambda: gap_precondition(torch.ones(0, 3), torch.ones(0)), ValueError, r"at least one row.*got \(0, 3\)"),
        (lambda: gap_precondition(torch.ones(2, 3), torch.ones(3)), ValueError, r"`gains` must have shape \(..., 2\)"),
        (lambda: gap_precondition(torch.ones(2, 3), torch.tensor(1.0)), ValueError, r"got \(\)"),
        (lambda: gap_precondition(torch.ones(4, 2, 3), torch.ones(3, 2)), ValueError, "`gains` must broadcast"),
        (lambda: gap_precondition(torch.ones(1, 1), torch.ones(1), derivative="exat"), ValueError, "mean 'exact'"),
        (lambda: gap_precondition(torch.ones(1, 1), torch.ones(1), rank=0), ValueError, "`rank` must be"),
        (lambda: gap_precondition(torch.ones(1, 1), torch.ones(1), rank=1.5), TypeError, "`rank` must be"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
