"""Modified stable ranks of many matrices at once, from singular vectors followed by products alone: for accelerators.

An accelerator spends more time on starting a small kernel than on running it, and a decomposition keeps the host
waiting for its status. So matrices of one shape are one batch, the small matrices of all shapes are another, and there
is no decomposition but a Cholesky factorization whose status is used on the device alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_plugins.functional.followed_eigen import follow_eigenvectors
from lightning_plugins.functional.products import add_outer_
from lightning_plugins.functional.singular_values import raise_to_one
from lightning_plugins.functional.spectrum import at_least_float32, finite_or_zero, full_precision

# A squared singular value below this many rounding errors of the largest has no direction of its own.
_NOISE = 64
# The part of the old vectors that is kept: the columns then stay independent even where the matrix maps all of them
# onto one. It slows the convergence by no more than this fraction.
_KEPT = 1 / 32


class FollowedParts(NamedTuple):
    """A modified stable rank of matrices ``(b, m, n)``, its gradient in parts, and the tracked vectors.

    Attributes:
        value: Shape ``(b,)``; NaN for a matrix with a value that is not finite, whose parts are then undefined.
        scale: Shape ``(b, 1, 1)``, as in `lightning_plugins.functional.stable_rank.FollowedRankTerm`.
        left: Shape ``(b, min(m, n), rank)``.
        right: Shape ``(b, rank, max(m, n))``.
        start: Orthonormal columns for the next call, shape ``(b, min(m, n), k)``; finite in any case.
    """

    value: Tensor
    scale: Tensor
    left: Tensor
    right: Tensor
    start: Tensor


class FollowedWhole(NamedTuple):
    """A modified stable rank of matrices ``(b, m, n)``, its gradient, and the tracked vectors.

    Attributes:
        value: Shape ``(b,)``; NaN for a matrix with a value that is not finite, whose gradient is then undefined.
        gradient: Shape ``(b, m, n)``.
        start: Orthonormal columns for the next call, shape ``(b, min(m, n), k)``; finite in any case.
    """

    value: Tensor
    gradient: Tensor
    start: Tensor


def followed_rank_terms(matrices: Sequence[Tensor], rank: int, starts: Sequence[Tensor]) -> list[FollowedParts]:
    """`modified_stable_rank` with ``p=2`` and its gradient, for matrices of several shapes.

    As `lightning_plugins.functional.stable_rank.followed_term` of each, up to rounding errors, for a ``start`` that
    comes from the step before: the vectors within it are turned into singular vectors by `follow_eigenvectors`.
    In float32, absolute entries are assumed to be between 1e-9 and 1e9.

    Args:
        matrices: Tensors of shape ``(b, m, n)``, each with sizes of its own, of one dtype, at least float32.
        rank: The target rank, less than ``k``.
        starts: Orthonormal columns ``(b, min(m, n), k)`` for each of them, with the same ``k`` for all.

    Returns:
        Values, gradients and the next starts, one entry for each of ``matrices``; 0 and zeros for matrices of zeros.

    Example:
        >>> weight, start = torch.diag(torch.tensor([2.0, 1.0, 1.0]))[None], torch.eye(3)[None]
        >>> followed_rank_terms([weight], 1, [start])[0].value
        tensor([0.5000])
    """
    with torch.no_grad(), full_precision(matrices[0]):
        blocks = [_project(matrix, start) for matrix, start in zip(matrices, starts, strict=True)]
        spectrum = _inside(blocks)
        head = spectrum.squares[:, :rank].sum(-1)
        inverse = 1 / head.masked_fill(head == 0, torch.inf)
        share = _norms(matrices).square() * inverse  # total over head: that of the tail plus 1
        scale = 2 * inverse
        value = (share - 1).clamp_min(0) + spectrum.poison
        sides = _advance(blocks, spectrum, (-scale * share)[:, None].expand(-1, rank))
        sizes = [len(block.wide) for block in blocks]
        each = zip(value.split(sizes), scale[:, None, None].split(sizes), sides, strict=True)
        return [FollowedParts(of_value, of_scale, *of_sides) for of_value, of_scale, of_sides in each]


def followed_nuclear_terms(matrices: Sequence[Tensor], rank: int, starts: Sequence[Tensor]) -> list[FollowedWhole]:
    """`modified_stable_rank` with ``p=1`` and its gradient from products, for matrices of several shapes.

    The sum of all singular values is the inner product of the weight with its polar factor, which is also its gradient;
    that of the head comes from tracked singular vectors.

    The accuracy is that of the ``start``, as for `followed_rank_terms`, and of `polar_factor` by products: singular
    values below 1e-3 of the Frobenius norm (1e-4 in float64) have less effect the smaller they are, and zero has none.

    Args:
        matrices: As for `followed_rank_terms`.
        rank: As for `followed_rank_terms`.
        starts: As for `followed_rank_terms`.

    Returns:
        Values, gradients and the next starts, one entry for each of ``matrices``; 0 and zeros for matrices of zeros.
    """
    with torch.no_grad(), full_precision(matrices[0]):
        blocks = [_project(matrix, start) for matrix, start in zip(matrices, starts, strict=True)]
        spectrum = _inside(blocks)
        values = spectrum.squares[:, :rank].sqrt()
        sizes = [len(block.wide) for block in blocks]
        lengths = _norms(matrices)
        lengths = lengths.masked_fill(lengths == 0, 1)[:, None, None].split(sizes)
        polars = [raise_to_one(matrix / length) for matrix, length in zip(matrices, lengths, strict=True)]
        products = zip(polars, matrices, strict=True)
        total = torch.cat([(polar * matrix).sum(dim=(-2, -1)) for polar, matrix in products])
        head = values.sum(-1)
        inverse = 1 / head.masked_fill(head == 0, torch.inf)
        share = total * inverse
        value = (share - 1).clamp_min(0) * (head > 0) + spectrum.poison
        least = torch.finfo(values.dtype).eps * values[:, :1]
        values = values.masked_fill(values <= least, torch.inf)  # a zero direction has no gradient
        sides = _advance(blocks, spectrum, -(share * inverse)[:, None] / values)
        found = []
        for polar, of_value, factor, (left, right, start) in zip(
            polars, value.split(sizes), inverse[:, None, None].split(sizes), sides, strict=True
        ):
            found.append(FollowedWhole(of_value, add_outer_(polar.mul_(factor), left, right), start))
        return found


class _Block(NamedTuple):
    """Matrices of one shape and their products with the tracked vectors."""

    wide: Tensor  # (b, m, n) with m <= n
    start: Tensor  # (b, m, k)
    rows: Tensor  # start.T @ wide
    ahead: Tensor  # wide @ wide.T @ start
    inside: Tensor  # (b, k, k), wide @ wide.T within the span


class _Spectrum(NamedTuple):
    """Squared singular values within the spans of all blocks, largest first, and their vectors within the spans."""

    squares: Tensor  # (N, k)
    rotation: Tensor  # (N, k, k)
    poison: Tensor  # (N,), 0 or NaN


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT


def _project(matrix: Tensor, start: Tensor) -> _Block:
    wide = _wide(at_least_float32(matrix))
    rows = start.mT @ wide
    return _Block(wide, start, rows, wide @ rows.mT, rows @ rows.mT)


def _inside(blocks: Sequence[_Block]) -> _Spectrum:
    safe, poison = finite_or_zero(torch.cat([block.inside for block in blocks]))
    values, vectors = follow_eigenvectors(safe)
    return _Spectrum(values.flip(-1).clamp_min(0), vectors.flip(-1), poison)


def _norms(matrices: Sequence[Tensor]) -> Tensor:
    """The Frobenius norm of each matrix of each batch, by a few kernels for all."""
    return torch.stack(torch._foreach_norm([matrix for batch in matrices for matrix in batch.unbind()]))


def _advance(blocks: Sequence[_Block], spectrum: _Spectrum, weights: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """One power iteration, and the wanted vectors.

    Args:
        blocks: The products.
        spectrum: What `_inside` made of them.
        weights: Factors on the wanted singular vectors, shape ``(N, rank)``.

    Returns:
        For each block the wanted vectors times their factors ``(b, m, rank)``, their rows ``vectors.T @ W``, and the
        vectors to start from next.
    """
    squares, rotation, poison = spectrum
    rank = weights.shape[-1]
    # Divided by the squares, the vectors that are a power iteration further are the old ones plus what leaves their
    # span, so their Gram matrix is never far below the identity. Directions that vanish are replaced by the old ones.
    tracked = squares > _NOISE * torch.finfo(squares.dtype).eps * squares[:, :1]
    of_ahead = rotation * torch.where(tracked, 1 / squares, 0)[:, None]
    wanted = rotation[..., :rank]
    kept = rotation * torch.where(tracked, _KEPT, 1.0)[:, None].to(rotation.dtype)
    of_start = torch.cat([wanted * weights[:, None], kept], dim=-1)
    sizes = [len(block.wide) for block in blocks]
    lefts, rights, nexts = [], [], []
    for block, start_by, ahead_by, rows_by in zip(
        blocks, of_start.split(sizes), of_ahead.split(sizes), wanted.mT.split(sizes), strict=True
    ):
        both = block.start @ start_by
        lefts.append(both[..., :rank])
        nexts.append(both[..., rank:].baddbmm_(block.ahead, ahead_by))
        rights.append(rows_by @ block.rows)
    upper, usable = _orthonormalizers(torch.cat([columns.mT @ columns for columns in nexts]))
    usable = (usable & (poison == 0))[:, None, None]
    starts = [
        torch.where(use, columns @ by, block.start)
        for use, columns, by, block in zip(usable.split(sizes), nexts, upper.split(sizes), blocks, strict=True)
    ]
    return list(zip(lefts, rights, starts, strict=True))


def _orthonormalizers(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Upper triangular matrices that make columns with these Gram matrices orthonormal, and where that succeeded."""
    inverse = gram.diagonal(dim1=-2, dim2=-1).rsqrt()
    unit = gram * inverse[..., None] * inverse[:, None]
    shift = 2 * gram.shape[-1] * torch.finfo(gram.dtype).eps  # above the rounding errors of the Gram matrix
    unit.diagonal(dim1=-2, dim2=-1).add_(shift)
    lower, failed = torch.linalg.cholesky_ex(unit)
    # The root undoes the shift where the columns were orthogonal, as they nearly are.
    scaled = torch.diag_embed(inverse * (1 + shift) ** 0.5)
    return torch.linalg.solve_triangular(lower, scaled, upper=False).mT, failed == 0
