import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_plugins.functional import (
    autocorrelation_eigenvalues,
    matrix_entropy,
    normalize_rows,
    spectrum,
    von_neumann_entropy,
)
from lightning_plugins.functional.spectral_sum import spectral_sum
from lightning_plugins.functional.spectrum import decompose, smaller_gram


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 4, 3)], ids=str)
def test_rows_get_unit_length(shape):
    h = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(normalize_rows(h), F.normalize(h, dim=-1))
    assert torch.autograd.gradcheck(normalize_rows, (h,))
    assert torch.autograd.gradgradcheck(normalize_rows, (h,))


def test_rows_without_length_stay_zero_and_get_no_gradient():
    h = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1e-42, 1e-42]], requires_grad=True)
    rows = normalize_rows(h)
    torch.testing.assert_close(rows, torch.tensor([[0.0, 0.0], [0.6, 0.8], [0.0, 0.0]]))
    (gradient,) = torch.autograd.grad((rows * torch.tensor([1.0, 2.0])).sum(), h, create_graph=True)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0], [-0.064, 0.048], [0.0, 0.0]]))
    (second,) = torch.autograd.grad(gradient.square().sum(), h)
    assert second.isfinite().all()
    torch.testing.assert_close(second[[0, 2]], torch.zeros(2, 2), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e25, 1e38])
def test_extreme_scales_neither_overflow_nor_underflow(scale):
    h = torch.tensor([[3.0, -1.0, 2.0], [-1.0, 0.5, 0.0]])
    torch.testing.assert_close(normalize_rows(h * scale), F.normalize(h, dim=1))


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float16, torch.float32), (torch.float64, torch.float64)])
def test_dtypes(dtype, expected):
    h = torch.randn(4, 3).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert normalize_rows(h).dtype == autocorrelation_eigenvalues(h).dtype == expected
    with pytest.raises(TypeError, match=r"`embeddings` must be a floating tensor, got torch\.int32"):
        normalize_rows(h.int())


@pytest.mark.parametrize("shape", [(6, 3), (3, 6), (4, 4), (2, 6, 3)], ids=str)
def test_eigenvalues_equal_numpy(shape):
    h = np.random.default_rng(0).normal(size=shape)
    z = h / np.linalg.norm(h, axis=-1, keepdims=True)
    values = np.linalg.eigvalsh(np.swapaxes(z, -1, -2) @ z / shape[-2])[..., ::-1]
    actual = autocorrelation_eigenvalues(torch.tensor(h, requires_grad=True))
    torch.testing.assert_close(actual, torch.tensor(values[..., : min(shape[-2:])].copy()))
    assert not actual.requires_grad


def test_eigenvalues_are_never_negative_and_nan_for_nan():
    assert (autocorrelation_eigenvalues(torch.ones(40, 30)) >= 0).all()
    h = torch.randn(2, 4, 3)
    h[1, 0, 0] = torch.nan
    values = autocorrelation_eigenvalues(h)
    assert values[0].isfinite().all()
    assert values[1].isnan().all()
    with pytest.raises(ValueError, match="unsqueeze"):
        autocorrelation_eigenvalues(torch.zeros(3))


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 3, 3)], ids=str)
def test_smaller_gram_matrix(shape):
    rows = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    n, d = shape[-2:]
    torch.testing.assert_close(smaller_gram(rows), (rows @ rows.mT if n <= d else rows.mT @ rows) / n)
    assert torch.autograd.gradcheck(smaller_gram, (rows,))
    assert torch.autograd.gradgradcheck(smaller_gram, (rows,))


def _symmetric(matrix):
    return (matrix + matrix.mT) / 2


def _positive(n, *batch, eigenvalues=None):
    basis = torch.linalg.qr(torch.randn(*batch, n, n, dtype=torch.float64))[0]
    values = torch.linspace(0.1, 1, n, dtype=torch.float64) if eigenvalues is None else eigenvalues
    return _symmetric(basis * values @ basis.mT)


@pytest.mark.parametrize("power", [0.5, 0.9, 1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("logarithm", [False, True])
def test_spectral_sum_and_its_derivatives(power, logarithm):
    matrix = _positive(4, 2).requires_grad_()
    x = torch.linspace(0.1, 1, 4, dtype=torch.float64)
    expected = (x**power * (x.log() if logarithm else 1)).sum()
    torch.testing.assert_close(spectral_sum(matrix, power=power, logarithm=logarithm), expected.expand(2))
    # Equal eigenvalues: the divided differences become derivatives.
    for values in (x, torch.tensor([0.3, 0.3, 0.7, 0.7], dtype=torch.float64)):
        start = _positive(4, eigenvalues=values).requires_grad_()

        def total(matrix):
            return spectral_sum(_symmetric(matrix), power=power, logarithm=logarithm)

        assert torch.autograd.gradcheck(total, (start,))
        assert torch.autograd.gradgradcheck(total, (start,))


def test_third_derivative_is_refused_rather_than_wrong():
    matrix = _positive(3).requires_grad_()
    (first,) = torch.autograd.grad(matrix_entropy(matrix), matrix, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), matrix, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        second.sum().backward()


def test_matrix_entropy_gradient_is_minus_log_minus_identity():
    values = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    matrix = _positive(3, eigenvalues=values).requires_grad_()
    (gradient,) = torch.autograd.grad(matrix_entropy(matrix), matrix)
    basis = torch.linalg.eigh(matrix.detach())[1]
    expected = -(basis * (values.flip(0).log() + 1)) @ basis.mT
    torch.testing.assert_close(gradient, expected)
    assert matrix_entropy(matrix.detach().bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("logarithm", [False, True])
def test_the_slope_at_a_zero_eigenvalue_is_that_at_the_floor(logarithm):
    """A power of one leaves no eigenvalue out, whereas a power below one does."""
    matrix = torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64)).requires_grad_()
    (gradient,) = torch.autograd.grad(spectral_sum(matrix, logarithm=logarithm), matrix)
    floor = torch.finfo(torch.float64).eps ** 2
    at_zero = np.log(floor) + 1 if logarithm else 1.0
    torch.testing.assert_close(gradient, torch.diag(torch.tensor([at_zero, 1.0], dtype=torch.float64)))


def test_kernels_of_power_below_one_leave_out_rounding_errors():
    noise = torch.diag(torch.tensor([1.0, 1e-7, -1e-7])).requires_grad_()
    value = spectral_sum(noise, power=0.5)
    torch.testing.assert_close(value.item(), 1.0)
    (gradient,) = torch.autograd.grad(value, noise, create_graph=True)
    torch.testing.assert_close(gradient.detach(), torch.diag(torch.tensor([0.5, 0.0, 0.0])))
    (second,) = torch.autograd.grad(gradient.square().sum(), noise)
    assert second.isfinite().all()


def _of_dead_units(seed: int) -> torch.Tensor:
    """Fifty embedding matrices of low rank, about half of whose rows are zero."""
    generator = torch.Generator().manual_seed(seed)
    alive = torch.rand(50, 40, 1, generator=generator) < 0.5
    weights = torch.randn(50, 40, 10, generator=generator) * alive
    weights = weights * (torch.rand(50, 40, 10, generator=generator) < 0.3)
    inputs = torch.randn(50, 10, 1, generator=generator) * torch.randn(50, 1, 40, generator=generator)
    return weights @ (inputs + 0.1).relu()


@pytest.mark.parametrize("seed", range(10))
def test_dead_units_do_not_break_the_decomposition(seed):
    """In float32 LAPACK's own routine returns NaN, or does not converge, for one or two in a thousand of these."""
    embeddings = _of_dead_units(seed).requires_grad_()
    expected = autocorrelation_eigenvalues(embeddings.detach().double())
    torch.testing.assert_close(autocorrelation_eigenvalues(embeddings), expected.float(), rtol=0, atol=2e-6)
    for entropy in (von_neumann_entropy, lambda h: matrix_entropy(smaller_gram(normalize_rows(h)))):
        value = entropy(embeddings)
        torch.testing.assert_close(value, von_neumann_entropy(embeddings.detach().double()).float(), rtol=0, atol=1e-4)
        (gradient,) = torch.autograd.grad(value.sum(), embeddings)
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("exponent", [-20.0, -22.2, -24.0])
def test_subnormal_matrices_have_finite_eigenvectors(exponent):
    """In float32 LAPACK's own routine returns NaN for one or two in a thousand of those in the middle."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 16, 64, generator=generator)
    rows *= 10 ** (exponent - 3 * torch.rand(2000, 16, 1, generator=generator))
    gram = rows @ rows.mT
    values, vectors = decompose(gram, vectors=True)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(16).expand(2000, -1, -1), rtol=0, atol=1e-5)
    expected = torch.linalg.eigvalsh(gram.double())
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=max(1e-43, 1e-5 * float(expected.max())))


def test_sizes_that_float64_is_faster_for_are_decomposed_in_it(monkeypatch):
    turned = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    values = torch.logspace(-6, 0, 40, dtype=torch.float64)
    matrix = ((turned * values) @ turned.mT).float()
    exact = torch.linalg.eigvalsh(matrix.double())
    monkeypatch.setattr(spectrum, "_is_better_wide", lambda matrix: matrix.dtype == torch.float32)
    for vectors in (True, False):
        found, basis = decompose(matrix.clone(), vectors=vectors)
        assert found.dtype == basis.dtype == torch.float32
        torch.testing.assert_close(found, exact.float(), rtol=1e-6, atol=0)  # in float32 the smallest is off by a tenth


def test_float64_is_taken_on_cuda_for_middle_sizes_alone(monkeypatch):
    assert not spectrum._is_better_wide(torch.empty(40, 40))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    taken = [n for n in (2, 32, 33, 512, 513) if spectrum._is_better_wide(torch.empty(n, n))]
    assert taken == [33, 512]
    assert not spectrum._is_better_wide(torch.empty(40, 40, dtype=torch.float64))
