import math

import pytest
import torch

from lightning_plugins.functional import matrix_entropy, matrix_log, products, von_neumann_entropy
from lightning_plugins.functional.matrix_log import log_by_products

SIZES = [16, 128, 300]


def _spectra(n):
    k = torch.arange(1, n + 1, dtype=torch.float64)
    spectra = {
        "flat": torch.ones_like(k),
        "power_1": 1 / k,
        "power_2": k**-2,
        "power_4": k**-4,
        "exponential": torch.exp(-k * 40 / n),
        "rank_deficient": (k <= max(1, n // 4)).double(),
        "rank_1": (k == 1).double(),
        "spike": torch.where(k == 1, 1, 1e-3 / n),
        "spike_on_the_least_favourable_floor": torch.where(k == 1, 1, 2e-6),
        "random_features": torch.linspace(1e-3, 1, n, dtype=torch.float64).square(),
    }
    return {name: values.double() / values.double().sum() for name, values in spectra.items()}


def _matrix(spectrum):
    basis = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), dtype=torch.float64))[0]
    matrix = basis * spectrum @ basis.mT
    return (matrix + matrix.mT) / 2, basis


def _errors(spectrum, dtype, method):
    """Errors of the value in nats, and of ``C^(1/2) (log(C) + I)`` in the Frobenius norm: sqrt(N)/2 the gradient's."""
    matrix, basis = _matrix(spectrum)
    log = spectrum.clamp_min(1e-300).log()
    matrix = matrix.to(dtype).requires_grad_()
    value = matrix_entropy(matrix, method=method)
    (gradient,) = torch.autograd.grad(value, matrix)
    exact = basis * (spectrum.sqrt() * (log + 1))
    error = (-gradient.double() @ (basis * spectrum.sqrt()) - exact).norm()
    return (value.double() + (spectrum * log).sum()).abs().item(), error.item(), exact.norm().item()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", _spectra(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_keep_the_stated_bound(name, n, dtype):
    spectrum = _spectra(n)[name]
    value_error, gradient_error, _ = _errors(spectrum, dtype, "products")
    bound = 4e-4 * math.sqrt(n * spectrum.max())  # the function's own bound of the largest eigenvalue can be larger
    assert value_error <= bound
    assert gradient_error <= bound


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", ["flat", "power_1", "exponential", "rank_deficient", "rank_1", "random_features"])
def test_products_are_closer_on_usual_spectra(name, n):
    value_error, gradient_error, norm = _errors(_spectra(n)[name], torch.float32, "products")
    assert value_error <= 1e-4
    assert gradient_error <= 1.5e-3 * norm


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", _spectra(4))
def test_decomposition_is_exact_in_float64(name, n):
    value_error, gradient_error, norm = _errors(_spectra(n)[name], torch.float64, "eigh")
    assert value_error <= 1e-12 * n
    assert gradient_error <= 1e-6 * norm


def test_scalar_error_of_the_logarithm_is_bounded():
    x = torch.cat([torch.logspace(-12, 0, 4000, dtype=torch.float64), torch.linspace(0.02, 1, 4000).double()])
    actual = log_by_products(x[:, None, None])[:, 0, 0]  # for one column the bound of the eigenvalue is nearly tight
    assert (actual - x.log()).abs().max() < 4.3e-5
    pairs = torch.stack([torch.diag(torch.stack([torch.ones_like(v), v])) for v in x])
    scale = 1 + 1e-6
    weighted = x.sqrt() * (log_by_products(pairs)[:, 1, 1] - x.log()).abs()
    assert weighted.max() < 4.01e-4 * scale
    assert weighted[x >= 0.021].max() < 4.4e-5 * 2**0.5


@pytest.mark.parametrize("n", [1, 7, 64, 300])
def test_upper_bound_is_one(n):
    for spectrum in _spectra(n).values():
        matrix = _matrix(spectrum)[0].float()[None]
        bound = matrix_log._upper_bound(matrix).item()
        assert spectrum.max() * (1 - 1e-6) <= bound <= 1.02 * n**0.25 * spectrum.max()


@pytest.mark.parametrize("trace", [1e-30, 1e-8, 1.0])
def test_matrices_of_small_trace(trace):
    spectrum = torch.tensor([0.5, 0.3, 0.2])
    matrix = torch.diag(spectrum * trace)
    expected = -(spectrum * trace * (spectrum * trace).log()).sum()
    torch.testing.assert_close(matrix_entropy(matrix, method="products"), expected, rtol=1e-4, atol=0)


def test_second_derivative_is_close_to_the_exact_one():
    h = torch.randn(20, 6, dtype=torch.float64)
    direction = torch.randn_like(h)

    def product_of_hessian(method):
        start = h.clone().requires_grad_()
        value = von_neumann_entropy(start, method=method)
        (gradient,) = torch.autograd.grad(value, start, create_graph=True)
        return torch.autograd.grad((gradient * direction).sum(), start)[0]

    exact = product_of_hessian("eigh")
    assert (product_of_hessian("products") - exact).norm() < 5e-3 * exact.norm()


def test_products_call_no_decomposition(monkeypatch):
    for name in ("eigh", "eigvalsh", "svd", "svdvals", "cholesky", "inv"):
        monkeypatch.setattr(torch.linalg, name, None)
    h = torch.randn(9, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(von_neumann_entropy(h, method="products"), h, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), h)
    assert second.isfinite().all()
    with pytest.raises(TypeError, match="not callable"):
        von_neumann_entropy(h, method="eigh")


def test_auto_decomposes_on_the_cpu_and_in_float64():
    h = torch.randn(40, 50)
    torch.testing.assert_close(von_neumann_entropy(h), von_neumann_entropy(h, method="eigh"), rtol=0, atol=0)
    assert von_neumann_entropy(h) != von_neumann_entropy(h, method="products")


def _tf32(tensor):
    """Rounds float32 to the 10 bits of mantissa that TF32 keeps."""
    return ((tensor.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


@pytest.mark.parametrize("name", ["flat", "rank_deficient"])
def test_products_stay_precise_where_a_gpu_would_round_to_tf32(name, monkeypatch):
    plain = torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda base, a, b, **scale: plain(base, _tf32(a), _tf32(b), **scale))
    spectrum = _spectra(128)[name]
    assert _errors(spectrum, torch.float32, "products")[1] > 1e-3  # the control: rounding does harm
    monkeypatch.setattr(products, "rounds_to_tf32", lambda tensor: True)
    assert _errors(spectrum, torch.float32, "products")[1] < 5e-5
