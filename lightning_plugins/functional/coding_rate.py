"""The log-determinant coding rate of embeddings, a measure of the volume they span, in nats."""

import torch
from torch import Tensor

from lightning_plugins._checks import check_bool, check_positive_number
from lightning_plugins.functional.spectrum import (
    at_least_float32,
    check_embeddings,
    finite_or_zero,
    full_precision,
    normalize_rows,
    smaller_gram,
)


def coding_rate(embeddings: Tensor, *, distortion: float = 0.5, unit_rows: bool = True) -> Tensor:
    """Coding rate, in nats, of the embeddings: ``logdet(I + d / (distortion * N) * Z.T @ Z) / 2``.

    ``Z`` are the rows, scaled to unit length or unchanged. It is computed from the smaller Gram matrix by a Cholesky
    factorisation of a matrix whose eigenvalues are at least 1, so that value, gradient and second derivative are finite
    for every finite input.

    Args:
        embeddings: Floating tensor of shape ``(..., N, d)``: ``N >= 1`` samples of dimension ``d >= 1``.
        distortion: The squared distortion up to which rows are coded, above 0.
        unit_rows: Whether to scale rows to unit length; rows of zeros are unchanged.

    Returns:
        Tensor of shape ``(...)``, at least 0 and for unit rows at most
        ``min(N, d) / 2 * log(1 + d / (distortion * min(N, d)))``: float32 for float16 and bfloat16 input, else the
        input's dtype. NaN for a matrix with a non-finite value. Autocast is disabled.

    Raises:
        TypeError: If ``embeddings`` is not a real floating tensor or ``distortion`` not a number.
        ValueError: If ``embeddings`` has fewer than two dimensions, no rows or no columns; if ``distortion`` is not
            above 0.

    Example:
        >>> coding_rate(torch.eye(2), distortion=1.0)  # two directions, each log(1 + 2 / 2) / 2
        tensor(0.6931)

    Source:
        Yu et al. (MCR²), NeurIPS 2020, https://arxiv.org/abs/2006.08558, whose code calls ``distortion`` ``eps``.
    """
    check_bool("unit_rows", unit_rows)
    check_embeddings(embeddings)
    check_positive_number("distortion", distortion)
    with full_precision(embeddings):
        rows = normalize_rows(embeddings) if unit_rows else at_least_float32(embeddings)
        matrix, poison = finite_or_zero(smaller_gram(rows) * (rows.shape[-1] / distortion))
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        factor, _ = torch.linalg.cholesky_ex(matrix + identity)
        rate: Tensor = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) + poison
    return rate
