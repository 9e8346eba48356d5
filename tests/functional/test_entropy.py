import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lightning_plugins.functional import (
    diagonal_entropy,
    effective_rank,
    matrix_entropy,
    normalize_rows,
    renyi_entropy,
    von_neumann_entropy,
)
from lightning_plugins.functional.entropy import uses_products

SHAPES = [(5, 3), (3, 5), (4, 4), (1, 4), (4, 1), (2, 5, 3), (2, 1, 3, 5)]
ENTROPIES = {
    "von_neumann": von_neumann_entropy,
    "renyi_0.5": lambda h: renyi_entropy(h, 0.5),
    "renyi_1": lambda h: renyi_entropy(h, 1),
    "renyi_1.5": lambda h: renyi_entropy(h, 1.5),
    "renyi_2": renyi_entropy,
    "renyi_3": lambda h: renyi_entropy(h, 3.0),
    "rank_of_eigenvalues": effective_rank,
    "rank_of_singular_values": lambda h: effective_rank(h, of="singular_values"),
    "diagonal": diagonal_entropy,
}
every_entropy = pytest.mark.parametrize("entropy", ENTROPIES.values(), ids=ENTROPIES)


def _degenerate():
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    return {
        "all_zero": torch.zeros(4, 6),
        "rank_1": torch.ones(4, 6),
        "duplicated_rows": rows[[0, 0, 1, 1, 2]],
        "dead_features": rows * torch.tensor([1.0, 0, 1, 0]),
        "all_zero_rows": rows * torch.tensor([1.0, 0, 1, 1, 0, 1])[:, None],
        "one_row": rows[:1],
        "one_column": rows[:, :1],
        "orthogonal": torch.eye(4),
        "subnormal": torch.full((3, 5), 1e-42),
    }


DEGENERATE = _degenerate()


def _published(embeddings):
    rows = F.normalize(embeddings, dim=1)
    values = torch.svd(rows / math.sqrt(len(rows)))[1].square()
    return -(values * values.log()).nansum()


def _eigenvalues(h):
    z = h / np.linalg.norm(h, axis=1, keepdims=True)
    return np.clip(np.linalg.eigvalsh(z.T @ z / len(z)), 1e-300, None)


def _entropy(p):
    return -np.sum(p * np.log(p))


def _in_numpy(name, h):
    if name == "rank_of_singular_values":
        values = np.linalg.svd(h, compute_uv=False)
        return np.exp(_entropy(values / values.sum()))
    if name == "diagonal":
        z = h / np.linalg.norm(h, axis=1, keepdims=True)
        return _entropy((z**2).mean(0))
    p = _eigenvalues(h)
    if name in {"von_neumann", "renyi_1", "rank_of_eigenvalues"}:
        return np.exp(_entropy(p)) if name == "rank_of_eigenvalues" else _entropy(p)
    order = float(name.removeprefix("renyi_")) if name != "renyi_2" else 2.0
    p = p[p > 1e-12]
    return np.log(np.sum(p**order)) / (1 - order)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ENTROPIES)
def test_value_equals_numpy(name, shape):
    h = np.random.default_rng(0).normal(size=shape)
    expected = np.reshape([_in_numpy(name, part) for part in h.reshape(-1, *shape[-2:])], shape[:-2])
    torch.testing.assert_close(ENTROPIES[name](torch.tensor(h)), torch.tensor(expected), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (6, 6)], ids=str)
def test_gradient_equals_autograd_through_the_published_formula(shape):
    h = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(_published(h), h)
    (actual,) = torch.autograd.grad(von_neumann_entropy(h), h)
    torch.testing.assert_close(actual, expected)
    loss = -0.3 * von_neumann_entropy(h.float())  # another incoming gradient, another dtype
    torch.testing.assert_close(torch.autograd.grad(loss, h)[0], -0.3 * expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "h",
    [torch.eye(4)[[0, 0, 1, 2]], torch.eye(4)[:, [0, 1, 2]].repeat(2, 1) @ torch.eye(3, 5), torch.ones(4, 6)],
    ids=["duplicated_rows", "dead_features", "rank_1"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_published_formula_has_no_finite_gradient_where_this_one_has(h, dtype):
    # Sparse rows, as after a ReLU: on others a singular value of zero may come out as 1e-17, which hides the fault.
    h = h.to(dtype).requires_grad_()
    assert not torch.autograd.grad(_published(h), h)[0].isfinite().all()
    assert torch.autograd.grad(von_neumann_entropy(h), h)[0].isfinite().all()


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (2, 5, 3), (2, 3, 5)], ids=str)
@every_entropy
def test_first_and_second_derivatives_equal_finite_differences(entropy, shape):
    h = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(entropy, (h,))
    assert torch.autograd.gradgradcheck(entropy, (h,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("h", DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize("method", ["eigh", "products", None], ids=str)
@every_entropy
def test_value_gradient_and_second_derivative_are_finite(entropy, method, h, dtype):
    if method is not None:
        entropy = _with(method, entropy)
    h = h.to(dtype).requires_grad_()
    value = entropy(h)
    (gradient,) = torch.autograd.grad(value, h, create_graph=True)
    (second,) = torch.autograd.grad((gradient * torch.randn_like(h)).sum(), h)
    assert value.dtype == gradient.dtype == dtype
    for result in (value, gradient, second):
        assert result.isfinite().all()
    dead = (h.abs().amax(1) < torch.finfo(dtype).tiny).nonzero().flatten()
    torch.testing.assert_close(gradient[dead], torch.zeros_like(gradient[dead]), rtol=0, atol=0)


def _with(method, entropy):
    return (lambda h: von_neumann_entropy(h, method=method)) if entropy is von_neumann_entropy else entropy


def test_all_zero_embeddings_have_no_entropy():
    for name, entropy in ENTROPIES.items():
        torch.testing.assert_close(entropy(torch.zeros(3, 4)).item(), 1.0 if "rank" in name else 0.0)


@pytest.mark.parametrize("method", ["eigh", "products"])
@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e20, 1e37])
def test_scale_of_the_rows_does_not_count(scale, method):
    h = torch.randn(6, 4)
    expected = von_neumann_entropy(h, method=method)
    torch.testing.assert_close(von_neumann_entropy(h * scale, method=method), expected)
    mixed = h * torch.tensor([scale, 1, scale, 1, 1, 1 / scale])[:, None]
    torch.testing.assert_close(von_neumann_entropy(mixed, method=method), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", ["eigh", "products"])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5)], ids=str)
def test_what_is_not_finite_gives_nan_for_its_matrix_alone(shape, method, value):
    h = torch.randn(2, *shape)
    h[0, 1, 2] = value
    h.requires_grad_()
    for entropy in [lambda h: von_neumann_entropy(h, method=method), *ENTROPIES.values()]:
        result = entropy(h)
        assert result.isnan().tolist() == [True, False]
        assert torch.autograd.grad(result[1], h)[0][1].isfinite().all()
    torch.autograd.grad(von_neumann_entropy(h, method=method).sum(), h)  # NaN or not: it must not raise


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_entropy
def test_half_precision_input_is_computed_in_float32(entropy, dtype):
    h = torch.randn(8, 5).to(dtype).requires_grad_()
    exact = h.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, expected = entropy(h), entropy(exact)
        (gradient,) = torch.autograd.grad(result, h)  # inside, where a backward's own products would be autocast
        (of_exact,) = torch.autograd.grad(expected, exact)
    assert result.dtype == torch.float32
    plain = exact.detach().requires_grad_()
    torch.testing.assert_close(result, entropy(plain), rtol=0, atol=0)
    torch.testing.assert_close(of_exact, torch.autograd.grad(entropy(plain), plain)[0], rtol=0, atol=0)
    torch.testing.assert_close(gradient, of_exact.to(dtype))


@pytest.mark.parametrize("method", ["eigh", "products"])
@pytest.mark.parametrize("shape", [(4, 5, 3), (4, 3, 5)], ids=str)
def test_works_under_function_transforms(shape, method):
    h = torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    def entropy(h):
        return von_neumann_entropy(h, method=method)

    (expected,) = torch.autograd.grad(entropy(h).sum(), h)
    per_sample = torch.func.vmap(torch.func.grad(entropy))(h.detach())
    torch.testing.assert_close(per_sample, expected)
    torch.testing.assert_close(torch.func.grad(lambda h: torch.func.vmap(entropy)(h).sum())(h.detach()), expected)
    torch.testing.assert_close(torch.autograd.grad(torch.func.vmap(entropy)(h).sum(), h)[0], expected)
    torch.testing.assert_close(torch.func.vmap(entropy)(h), entropy(h))
    hessian = torch.autograd.functional.hessian(entropy, h[0].detach())
    twice = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(entropy)))(h.detach())
    torch.testing.assert_close(twice[0], hessian)


def test_large_batched_products_equal_small_ones():
    h = torch.randn(2, 300, 300, dtype=torch.float64, requires_grad=True)  # large enough to be multiplied in blocks
    (gradient,) = torch.autograd.grad(von_neumann_entropy(h).sum(), h)
    for part, expected in zip(h.detach(), gradient, strict=True):
        part.requires_grad_()
        rows = normalize_rows(part)
        (actual,) = torch.autograd.grad(matrix_entropy(rows.mT @ rows / 300), part)
        torch.testing.assert_close(actual, expected)
    vmapped = torch.func.vmap(torch.func.grad(von_neumann_entropy))(h.detach())
    torch.testing.assert_close(vmapped, gradient)


seeds = st.integers(0, 2**31)
sizes = st.integers(1, 10)


def _random(n, d, seed):
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** (2 * torch.rand(d, generator=generator, dtype=torch.float64) - 1)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * scale


@given(n=sizes, d=sizes, seed=seeds)
def test_bounds_and_inequalities(n, d, seed):
    h = _random(n, d, seed)
    rows = normalize_rows(h)
    entropy = von_neumann_entropy(h).item()
    assert -1e-12 <= entropy <= math.log(min(n, d)) + 1e-12
    assert renyi_entropy(h).item() <= entropy + 1e-12 <= renyi_entropy(h, 0.5).item() + 2e-12
    assert entropy <= diagonal_entropy(h).item() + 1e-12
    assert math.exp(entropy) <= torch.linalg.matrix_rank(rows.mT @ rows).item() + 1e-9
    assert effective_rank(rows, of="singular_values").item() >= math.exp(entropy) - 1e-9


@given(n=sizes, d=sizes, seed=seeds)
def test_rotations_and_scales_of_rows_change_nothing(n, d, seed):
    h = _random(n, d, seed)
    rotation = torch.linalg.qr(_random(d, d, seed + 1))[0]
    lengths = _random(n, 1, seed + 2).abs() + 0.1
    torch.testing.assert_close(von_neumann_entropy(lengths * h @ rotation), von_neumann_entropy(h))


@given(n=sizes, d=sizes, seed=seeds, share=st.integers(1, 9))
def test_is_concave_over_ranks(n, d, seed, share):
    first, second = (normalize_rows(_random(rows, d, seed + rows)) for rows in (n, share))
    weight = n / (n + share)
    parts = weight * von_neumann_entropy(first) + (1 - weight) * von_neumann_entropy(second)
    assert von_neumann_entropy(torch.cat([first, second])) >= parts - 1e-12


@given(d=sizes, seed=seeds)
def test_is_largest_for_the_identity_alone_and_the_diagonal_entropy_for_diagonal_matrices(d, seed):
    basis = torch.linalg.qr(_random(d, d, seed))[0]
    torch.testing.assert_close(von_neumann_entropy(basis).item(), math.log(d))
    weights = torch.rand(d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    uneven = basis.mT @ torch.diag(weights / weights.sum()) @ basis
    if d > 1:
        assert matrix_entropy(uneven) < math.log(d)
    features = torch.eye(d, dtype=torch.float64)[torch.randint(d, (12,), generator=torch.Generator().manual_seed(seed))]
    torch.testing.assert_close(von_neumann_entropy(features), diagonal_entropy(features))


def test_two_effective_ranks_differ():
    h = torch.diag(torch.tensor([1.0, 1.0, 2.0, 0.0]))
    # Three of four rows have unit length, so three eigenvalues of 1/4, and singular values in the ratio 1 : 1 : 2.
    torch.testing.assert_close(effective_rank(h).item(), 4**0.75)
    torch.testing.assert_close(effective_rank(h, of="singular_values").item(), 8**0.5)
    torch.testing.assert_close(effective_rank(7 * h, of="singular_values").item(), 8**0.5)


def test_singular_values_of_float32_are_not_squared_in_float32():
    values = torch.full((100,), 3e-4, dtype=torch.float64)  # their squares would be lost beside 1
    values[0] = 1
    h = torch.linalg.qr(torch.randn(200, 100, dtype=torch.float64))[0] * values
    expected = _in_numpy("rank_of_singular_values", h.numpy())
    torch.testing.assert_close(effective_rank(h.float(), of="singular_values").item(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("device", "dtype", "n", "expected"),
    [
        ("cuda", torch.float32, 512, True),
        ("cuda", torch.float64, 512, False),
        ("cuda", torch.float32, 8, False),
        ("cpu", torch.float32, 512, False),
    ],
)
def test_auto_takes_products_for_float32_on_a_gpu(device, dtype, n, expected):
    tensor = SimpleNamespace(is_cuda=device == "cuda", dtype=dtype)  # stands for a tensor on a device not at hand
    assert uses_products(tensor, n, "auto") is expected
    assert uses_products(tensor, n, "products")
    assert not uses_products(tensor, n, "eigh")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: von_neumann_entropy(torch.randn(3)), ValueError, r"`embeddings` .*\(\.\.\., N, d\), got \(3,\)"),
        (lambda: von_neumann_entropy(torch.randn(0, 3)), ValueError, "at least one row"),
        (lambda: von_neumann_entropy(torch.randn(2, 3, 0)), ValueError, r"one column, got \(2, 3, 0\)"),
        (lambda: von_neumann_entropy(torch.ones(3, 2).long()), TypeError, r"int64; convert it with `embeddings.float"),
        (lambda: von_neumann_entropy(torch.ones(3, 2).cfloat()), TypeError, "complex64"),
        (lambda: von_neumann_entropy([[1.0]]), TypeError, "`embeddings` must be a floating tensor, got list"),
        (lambda: von_neumann_entropy(torch.eye(2), method="eig"), ValueError, "`method` .* did you mean 'eigh'"),
        (lambda: von_neumann_entropy(torch.eye(2), method=None), TypeError, "`method` must be 'auto'"),
        (lambda: matrix_entropy(torch.randn(2, 3)), ValueError, r"`matrix` .*\(\.\.\., n, n\)"),
        (lambda: matrix_entropy(torch.randn(3)), ValueError, r"`matrix` .*got \(3,\)"),
        (lambda: matrix_entropy(torch.randn(0, 0)), ValueError, "n of at least 1"),
        (lambda: matrix_entropy(torch.eye(2).int()), TypeError, "`matrix` must be a floating tensor, got torch.int32"),
        (lambda: matrix_entropy(torch.eye(2), method="svd"), ValueError, "`method` must be .* got 'svd'"),
        (lambda: renyi_entropy(torch.eye(2), order=0), ValueError, "`order` must be above 0 and finite, got 0"),
        (lambda: renyi_entropy(torch.eye(2), order=math.inf), ValueError, "got inf"),
        (lambda: renyi_entropy(torch.eye(2), order=math.nan), ValueError, "got nan"),
        (lambda: renyi_entropy(torch.eye(2), order=True), TypeError, "`order` must be a number"),
        (lambda: renyi_entropy(torch.eye(2), order="2"), TypeError, r"got '2' \(str\)"),
        (lambda: renyi_entropy(torch.eye(2).long()), TypeError, "int64"),
        (lambda: effective_rank(torch.eye(2), of="singular"), ValueError, "did you mean 'singular_values'"),
        (lambda: effective_rank(torch.zeros(2)), ValueError, "unsqueeze"),
        (lambda: diagonal_entropy(torch.zeros(2)), ValueError, "unsqueeze"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
