"""Spectral norms of the products of query and key maps per head, tracked from step to step."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_plugins.functional.gram_svd import check_matrices
from lightning_plugins.functional.spectrum import at_least_float32, decompose, finite_or_zero, full_precision

_VECTORS = 4  # tracked vectors per head: the error of the first shrinks by (s5 / s1) ** 2 at each call


class QueryKeyNorms(NamedTuple):
    """The largest singular values of ``Q.T @ K``.

    Attributes:
        norms: Shape ``(heads,)``.
        start: Orthonormal columns ``(heads, d, k)`` for the next call after the maps changed.
    """

    norms: Tensor
    start: Tensor


def query_key_norms(query: Tensor, key: Tensor, start: Tensor | None = None) -> QueryKeyNorms:
    """Spectral norm of the bilinear map ``Q.T @ K`` of each head's logits, without the ``d x d`` matrix.

    Without ``start`` it is exact. With it the value is optimal within its span, never above the true one, and the
    returned ``start`` is advanced by one power iteration.

    Args:
        query: Floating tensor of shape ``(heads, h, d)``.
        key: Floating tensor of the same shape.
        start: As returned by an earlier call.

    Returns:
        The norms, without gradient: float32 for float16 and bfloat16 input, else the input's dtype. NaN for a head with
        a non-finite value.

    Raises:
        TypeError: If a tensor is not a real floating one.
        ValueError: If the tensors do not have one shape ``(heads, h, d)``.

    Example:
        >>> query_key_norms(2 * torch.eye(3)[None], 5 * torch.eye(3)[None]).norms
        tensor([10.])
    """
    check_matrices("query", query)
    check_matrices("key", key)
    if query.ndim != 3 or query.shape != key.shape:
        raise ValueError(
            f"`query` and `key` must have one shape (heads, h, d), got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    with torch.no_grad(), full_precision(query):
        one, other = at_least_float32(query), at_least_float32(key)
        poison = (one.sum((-2, -1)) + other.sum((-2, -1))) * 0
        one, other = torch.nan_to_num(one, 0.0, 0.0, 0.0), torch.nan_to_num(other, 0.0, 0.0, 0.0)
        exact = start is None or start.shape[:2] != (len(one), one.shape[-1])
        basis = _exact(one, other) if start is None or exact else start.to(one)
        rows = one.mT @ (other @ basis)  # the product times the basis
        safe, more = finite_or_zero(rows.mT @ rows)
        squares, rotation = decompose(safe, vectors=True)
        ahead = other.mT @ (one @ (rows @ rotation.flip(-1)))
        following = torch.linalg.qr(ahead)[0].contiguous()
        return QueryKeyNorms(squares[..., -1].clamp_min(0).sqrt() + poison + more, following)


def _exact(query: Tensor, key: Tensor) -> Tensor:
    """Leading right singular vectors of ``Q.T @ K`` from triangular factors of the maps."""
    _, left = torch.linalg.qr(query.mT)
    basis, right = torch.linalg.qr(key.mT)
    small = torch.linalg.svd(left @ right.mT)[2].mT  # never differentiated
    vectors: Tensor = basis @ small[..., : min(_VECTORS, small.shape[-1])]
    return vectors
