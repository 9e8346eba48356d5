"""Squared correlations between different features, as in the off-diagonal part of Barlow Twins."""

from torch import Tensor

from lightning_plugins._checks import check_bool, check_positive_number
from lightning_plugins.functional.spectrum import at_least_float32, check_embeddings, full_precision
from lightning_plugins.functional.tensors import check_floating
from lightning_plugins.functional.variance_covariance import centre_rows, off_diagonal


def decorrelation(
    embeddings: Tensor, other: Tensor | None = None, *, centred: bool = True, eps: float = 1e-5
) -> Tensor:
    """Sum of the squared correlations between different features, of one view or between two.

    Every feature is divided by ``sqrt(var + eps)`` with its (biased) variance over the rows, as in batch normalisation,
    and ``C = Z.T @ Z' / N``; the value is the sum of ``C[i, j] ** 2`` over ``i != j``.

    Args:
        embeddings: Floating tensor of shape ``(..., N, d)``: ``N >= 1`` samples of dimension ``d >= 1``.
        other: A second view of the same samples, of the same shape; None for the embeddings themselves.
        centred: Whether to subtract the mean row first; otherwise ``var`` is the mean square.
        eps: Added to the variances, above 0.

    Returns:
        Tensor of shape ``(...)`` in ``[0, d * (d - 1)]``: float32 for float16 and bfloat16 input, else the input's
        dtype. NaN for a matrix with a non-finite value.

    Raises:
        TypeError: If a tensor is not a real floating one, or ``eps`` not a number.
        ValueError: If ``embeddings`` has fewer than two dimensions, no rows or no columns; if ``other`` has another
            shape; if ``eps`` is not above 0.

    Example:
        >>> import torch
        >>> round(decorrelation(torch.tensor([[1.0, 1.0], [-1.0, -1.0]])).item(), 3)  # correlation 1, counted twice
        2.0

    Source:
        Zbontar et al. (Barlow Twins), ICML 2021, https://arxiv.org/abs/2103.03230, and its code; the form of one view
        is ours.
    """
    check_bool("centred", centred)
    check_embeddings(embeddings)
    check_positive_number("eps", eps)
    if other is not None:
        check_floating("other", other)
        if other.dtype != embeddings.dtype:
            raise TypeError(f"`other` must have the dtype of `embeddings`, {embeddings.dtype}, got {other.dtype}")
        if other.shape != embeddings.shape:
            raise ValueError(
                f"`other` must have the shape of `embeddings`, {tuple(embeddings.shape)}, got {tuple(other.shape)}; "
                "its rows are the same samples in the same order"
            )
    with full_precision(embeddings):
        one = _standardized(embeddings, centred, eps)
        two = one if other is None else _standardized(other, centred, eps)
        correlation = one.mT @ two / one.shape[-2]
        return off_diagonal(correlation).square().sum((-2, -1))


def _standardized(embeddings: Tensor, centred: bool, eps: float) -> Tensor:
    rows = centre_rows(embeddings) if centred else at_least_float32(embeddings)
    return rows / (rows.square().mean(-2, keepdim=True) + eps).sqrt()
