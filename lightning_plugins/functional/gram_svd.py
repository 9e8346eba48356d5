"""Singular values and vectors from the smaller Gram matrix, with scaling, NaN marking and a rounding cutoff."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_plugins.functional.spectrum import decompose, finite_or_zero, gram
from lightning_plugins.functional.tensors import check_floating


class GramEigen(NamedTuple):
    """Eigenvalues of the smaller Gram matrix of scaled matrices, divided by their number of rows as in `gram`.

    Attributes:
        eigenvalues: Shape ``(..., k)`` with ``k = min(m, n)``, smallest first.
        vectors: Eigenvectors as columns, ``(..., k, k)``: the singular vectors on the smaller side; or empty.
        scaled: The matrices divided by ``scale``, ``(..., m, n)``; unchanged where not finite.
        scale: Their largest absolute entries, ``(..., 1, 1)``; 1 for a matrix of zeros.
        poison: 0, or NaN for a matrix with a value that is not finite, ``(...)``, to add to results.
    """

    eigenvalues: Tensor
    vectors: Tensor
    scaled: Tensor
    scale: Tensor
    poison: Tensor


class GramSVD(NamedTuple):
    """Thin singular value decomposition of wide matrices ``(..., m, n)``, ``m <= n``, in the order of ``left``.

    Attributes:
        left: Left singular vectors as columns, ``(..., m, k)``.
        values: Singular values ``(..., k)``, exactly zero below ``10 * eps`` of the largest.
        rows: ``left.T @ W``, ``(..., k, n)``.
        right: The same scaled to unit length, with a zero row for a singular value of zero.
        poison: 0, or NaN for a matrix with a value that is not finite, ``(...)``, to add to results.
    """

    left: Tensor
    values: Tensor
    rows: Tensor
    right: Tensor
    poison: Tensor


def check_matrices(name: str, tensor: Tensor) -> None:
    """Raise an error unless it is a floating tensor ``(..., m, n)`` with rows and columns."""
    check_floating(name, tensor)
    shape = tuple(tensor.shape)
    if len(shape) < 2:
        raise ValueError(f"`{name}` must have shape (..., m, n), got {shape}; a single row is `{name}.unsqueeze(0)`")
    if 0 in shape[-2:]:
        raise ValueError(f"`{name}` must have shape (..., m, n) with at least one row and one column, got {shape}")


def unit_scale(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Divide matrices by their largest absolute entry, so that squares neither overflow nor underflow.

    Returns:
        The scaled matrices, and the scales ``(..., 1, 1)``, constant for autograd; 1 for a matrix of zeros.
    """
    with torch.no_grad():
        scale = matrix.abs().amax(dim=(-2, -1), keepdim=True)
        scale = scale.masked_fill(scale < torch.finfo(scale.dtype).tiny, 1)
    return matrix / scale, scale


def gram_eigen(matrix: Tensor, *, vectors: bool) -> GramEigen:
    """Decompose the smaller Gram matrix of scaled matrices.

    Args:
        matrix: Float32 or float64 tensor of shape ``(..., m, n)``.
        vectors: Whether to compute the eigenvectors.

    Returns:
        Eigenvalues, eigenvectors, and the scaled matrices.

    Example:
        >>> gram_eigen(torch.diag(torch.tensor([4.0, 2.0])), vectors=False).eigenvalues * 2  # of [1, 0.5], squared
        tensor([0.2500, 1.0000])
    """
    scaled, scale = unit_scale(matrix)
    safe, poison = finite_or_zero(gram(scaled))
    eigenvalues, found = decompose(safe, vectors=vectors, overwrite=True)
    return GramEigen(eigenvalues, found, scaled, scale, poison)


def gram_svd(matrix: Tensor) -> GramSVD:
    """Thin singular value decomposition from one eigendecomposition of the smaller Gram matrix, smallest values first.

    The singular values are the lengths of the rows of ``left.T @ W``, without the squaring of the eigenvalues.

    Args:
        matrix: Float32 or float64 tensor of shape ``(..., m, n)``; if ``m > n`` its transpose is decomposed.

    Returns:
        The decomposition of the wide matrices.

    Example:
        >>> gram_svd(torch.diag(torch.tensor([0.0, 3.0, 2.0]))).values
        tensor([0., 2., 3.])
    """
    wide = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    found = gram_eigen(wide, vectors=True)
    scaled, poison = finite_or_zero(found.scaled)
    return svd_from_left(scaled, found.scale, found.vectors, found.poison + poison)


def svd_from_left(scaled: Tensor, scale: Tensor, left: Tensor, poison: Tensor) -> GramSVD:
    """Complete a decomposition from its left singular vectors.

    Args:
        scaled: Finite wide matrices ``(..., m, n)`` divided by ``scale``.
        scale: As `unit_scale` returns it.
        left: Orthonormal columns ``(..., m, k)``.
        poison: As `finite_or_zero` returns it.

    Returns:
        The decomposition, in the order of the columns of ``left``.
    """
    rows = left.mT @ scaled
    values = torch.linalg.vector_norm(rows, dim=-1)
    vanishing = values <= 10 * torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True)
    right = rows / values.masked_fill(vanishing, torch.inf)[..., None]
    return GramSVD(left, values.masked_fill(vanishing, 0) * scale[..., 0], rows * scale, right, poison)
