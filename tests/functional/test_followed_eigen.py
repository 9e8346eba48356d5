import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_plugins.functional.followed_eigen import follow_eigenvectors


def _coupling(matrix, vectors):
    """The part of the matrix that is not diagonal in the basis, relative to the matrix."""
    inside = vectors.mT @ matrix @ vectors
    return ((inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))).norm() / inside.norm()).item()


def _gram(*shape, dtype=torch.float64):
    weight = torch.randn(*shape, dtype=dtype)
    return weight, weight @ weight.mT / shape[-2]


@pytest.mark.parametrize("n", [2, 9, 64])
def test_a_basis_follows_a_matrix_that_changes(n):
    torch.manual_seed(0)
    weight, gram = _gram(3, n, 2 * n)
    vectors = torch.linalg.eigh(gram)[1]
    for _ in range(12):
        weight = weight + 1e-3 * torch.randn_like(weight)
        gram = weight @ weight.mT / n
        values, vectors = follow_eigenvectors(gram, vectors)
        torch.testing.assert_close(values, torch.linalg.eigvalsh(gram), rtol=0, atol=1e-6)
    assert _coupling(gram, vectors) < 1e-4
    assert (vectors.mT @ vectors - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-10


def test_the_error_is_squared_by_a_pass():
    torch.manual_seed(0)
    gram = torch.diag(torch.arange(1.0, 9, dtype=torch.float64))
    noise = torch.randn(8, 8, dtype=torch.float64)
    for size in (1e-2, 1e-3, 1e-4):
        matrix = gram + size * (noise + noise.T)
        assert _coupling(matrix, follow_eigenvectors(matrix)[1]) < 10 * size**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_basis_that_is_far_off_is_found_again(dtype):
    torch.manual_seed(0)
    _, gram = _gram(2, 32, 64, dtype=dtype)
    vectors = torch.linalg.qr(torch.randn_like(gram))[0]
    values, vectors = follow_eigenvectors(gram, vectors, passes=40)
    assert _coupling(gram, vectors) < 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(values, torch.linalg.eigvalsh(gram), rtol=0, atol=100 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "spectrum",
    [[0.0] * 6, [1.0] * 6, [1.0, 1, 1, 0, 0, 0], [1e-12, 1e-6, 1, 1, 1 + 1e-9, 5], [1e20, 1, 1, 1, 0, 0]],
    ids=str,
)
def test_equal_and_vanishing_eigenvalues(spectrum, dtype):
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    wanted = torch.tensor(spectrum, dtype=torch.float64)
    matrix = (basis * wanted @ basis.T).to(dtype)
    values, vectors = follow_eigenvectors(matrix, basis.to(dtype), passes=3)
    tolerance = 50 * torch.finfo(dtype).eps * max(spectrum)
    torch.testing.assert_close(values.double(), wanted.sort()[0], rtol=0, atol=tolerance)
    assert (vectors.mT @ vectors - torch.eye(6)).abs().max() < 50 * torch.finfo(dtype).eps


def test_a_mean_of_functions_survives_a_pair_that_is_left_unrotated():
    coupled = torch.tensor([[1.0, 1e-3], [1e-3, 1.0]], dtype=torch.float64)  # no gap to say which way to rotate
    values, vectors = follow_eigenvectors(coupled)
    rebuilt = (vectors * values.sqrt()) @ vectors.mT
    exact = torch.linalg.eigh(coupled)
    assert (rebuilt - (exact[1] * exact[0].sqrt()) @ exact[1].mT).abs().max() < 0.51e-3  # half the coupling


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10_000), st.floats(0, 10))
def test_vectors_stay_orthonormal_and_values_within_the_spectrum(n, seed, size):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n, n, dtype=torch.float64, generator=generator) * size
    matrix = matrix + matrix.T
    values, vectors = follow_eigenvectors(matrix, passes=3)
    exact = torch.linalg.eigvalsh(matrix)
    assert (vectors.T @ vectors - torch.eye(n)).abs().max() < 1e-2
    assert values.min() >= exact.min() - 0.02 * (1 + exact.abs().max())
    assert values.max() <= exact.max() + 0.02 * (1 + exact.abs().max())
    assert bool((values.diff() >= 0).all())


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_very_small_and_very_large_matrices(scale):
    torch.manual_seed(0)
    matrix = torch.diag(torch.arange(1.0, 7)) + 0.01 * torch.ones(6, 6)
    values, vectors = follow_eigenvectors(matrix * scale, passes=3)
    torch.testing.assert_close(values / scale, torch.linalg.eigvalsh(matrix), rtol=1e-5, atol=0)
    assert _coupling(matrix, vectors) < 1e-5


def test_passes_are_checked():
    with pytest.raises(ValueError, match="`passes` must be at least 1, got 0"):
        follow_eigenvectors(torch.eye(2), passes=0)
