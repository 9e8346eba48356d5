"""The span of the leading singular vectors, exact or tracked while a matrix changes slowly."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_plugins._checks import check_positive_int
from lightning_plugins.functional.followed_eigen import follow_eigenvectors
from lightning_plugins.functional.gram_svd import check_matrices, gram_eigen
from lightning_plugins.functional.spectrum import at_least_float32, decompose, finite_or_zero, full_precision
from lightning_plugins.functional.tensors import check_floating


class Subspace(NamedTuple):
    """Leading singular vectors on the smaller side of matrices ``(..., m, n)``: left ones if ``m <= n``, else right.

    Attributes:
        basis: Orthonormal columns, shape ``(..., min(m, n), k)``, the vector of the largest singular value first.
        values: Their singular values, shape ``(..., k)``, descending.
        rows: ``basis.T @ W``, or ``basis.T @ W.T`` if ``m > n``: shape ``(..., k, max(m, n))``.
        start: Orthonormal columns, shape ``(..., min(m, n), k)``, for the next call after the matrix changed.
        angles: Estimated angles, in radians, between the columns of ``basis`` and the true span, shape ``(..., k)``;
            zeros without ``start``.
    """

    basis: Tensor
    values: Tensor
    rows: Tensor
    start: Tensor
    angles: Tensor


def top_singular_subspace(
    weight: Tensor, rank: int, *, start: Tensor | None = None, leading: int | None = None
) -> Subspace:
    """The ``rank`` largest singular values and their vectors on the smaller side.

    Without ``start`` they come from an eigendecomposition of the smaller Gram matrix: values down to ``sqrt(eps)`` of
    the largest are exact to about that.

    With ``start`` they are the best approximations (Rayleigh-Ritz) within its span, and the ``start`` that is returned
    is one power iteration further: three products with the weight and a decomposition of ``rank x rank``. For a matrix
    that changes little between calls, the error of the leading ``r < rank`` vectors shrinks by the factor
    ``s[rank] ** 2 / s[r] ** 2`` at each call, so ask for some more than are needed. ``values`` are never above the true
    ones, and exact to second order in the error of the vectors. Entries are then squared without scaling: in float32,
    absolute values between 1e-15 and 1e15 are assumed.

    Args:
        weight: Floating tensor of shape ``(..., m, n)`` with ``m, n >= 1``.
        rank: Number of vectors, from 1 to ``min(m, n)``.
        start: Orthonormal columns of shape ``(..., min(m, n), rank)`` from an earlier call.
        leading: Number of vectors, values and rows to return; by default all. ``start`` always has all.

    Returns:
        The vectors and values, without gradient: float32 for float16 and bfloat16 input, else the input's dtype. For a
        matrix with a non-finite value, the values are NaN and the vectors finite.

    Raises:
        TypeError: If ``weight`` is not a real floating tensor or ``rank`` not an int.
        ValueError: If ``weight`` does not have the shape described, or ``rank`` or ``start`` does not fit it.

    Example:
        >>> weight = torch.diag(torch.tensor([1.0, 3.0, 2.0]))
        >>> top_singular_subspace(weight, 2).values.round(decimals=4)
        tensor([3., 2.])
    """
    check_matrices("weight", weight)
    side = min(weight.shape[-2:])
    if check_positive_int("rank", rank) > side:
        raise ValueError(f"`rank` must be at most the smaller side, {side}, of `weight`, got {rank}")
    if leading is not None and check_positive_int("leading", leading) > rank:
        raise ValueError(f"`leading` must be at most `rank`, {rank}, got {leading}")
    if start is not None:
        check_floating("start", start)
    expected = (*weight.shape[:-2], side, rank)
    if start is not None and start.shape != expected:
        raise ValueError(f"`start` must have shape {expected} for this `weight` and `rank`, got {tuple(start.shape)}")
    with torch.no_grad(), full_precision(weight):
        matrix = at_least_float32(weight)
        wide = matrix if matrix.shape[-2] == side else matrix.mT
        leading = rank if leading is None else leading
        return _exact(wide, rank, leading) if start is None else _follow(wide, start.to(matrix), leading)


def _exact(matrix: Tensor, rank: int, leading: int) -> Subspace:
    eigenvalues, vectors, _, scale, poison = gram_eigen(matrix, vectors=True)
    scale = scale * matrix.shape[-2] ** 0.5  # the Gram matrix is divided by the number of rows
    start = vectors[..., -rank:].flip(-1).contiguous()
    basis = start[..., :leading]
    values = eigenvalues[..., -rank:].flip(-1)[..., :leading].clamp_min(0).sqrt() * scale[..., 0]
    values = values + poison[..., None]
    return Subspace(basis, values, basis.mT @ matrix, start, torch.zeros_like(values))


def _follow(matrix: Tensor, start: Tensor, leading: int) -> Subspace:
    """Only two products with the matrix: on a CPU each further pass would cost as much as a narrow product."""
    rows = start.mT @ matrix
    safe, poison = finite_or_zero(rows @ rows.mT)
    eigenvalues, rotation = _turn(safe)
    rotation = rotation.flip(-1)
    wanted = rotation[..., :leading]
    squares = eigenvalues.flip(-1).clamp_min(0)
    values = squares[..., :leading].sqrt() + poison[..., None]
    basis = start @ wanted
    ahead = matrix @ rows.mT @ rotation
    # The residual of each vector for the Gram matrix, over the gap to the spectrum outside the block.
    residual = torch.linalg.vector_norm(ahead[..., :leading] - basis * squares[..., None, :leading], dim=-2)
    gap = squares[..., :leading] - squares[..., -1:]
    tiny = torch.finfo(gap.dtype).eps * squares[..., :1]
    angles = residual / torch.maximum(gap, tiny).clamp_min(torch.finfo(gap.dtype).tiny)
    # Householder: columns of a rank-deficient matrix may vanish, and are then completed to an orthonormal set. The
    # memory layout must be preserved through a checkpoint: products in another layout differ in the last bit.
    following = torch.linalg.qr(torch.where(poison[..., None, None] == 0, ahead, start))[0].contiguous()
    return Subspace(basis, values, wanted.mT @ rows, following, angles)


def _turn(inside: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of small matrices: on an accelerator, where a decomposition waits, from products."""
    return follow_eigenvectors(inside) if _decomposition_waits(inside) else decompose(inside, vectors=True)


def _decomposition_waits(matrix: Tensor) -> bool:
    return not matrix.is_cpu
