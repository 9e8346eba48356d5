"""Inner products of different embeddings compared with those of points spread evenly over the sphere."""

from torch import Tensor

from lightning_plugins.functional.spectrum import check_embeddings, full_precision, normalize_rows
from lightning_plugins.functional.variance_covariance import off_diagonal


def spread_out(embeddings: Tensor) -> Tensor:
    """Distance of the inner products of unit rows from those of the uniform distribution on the sphere.

    With ``M1`` the mean and ``M2`` the mean square of the inner products over all pairs of different rows, the value is
    ``M1 ** 2 + relu(M2 - 1 / d)``: for uniform points they are 0 and ``1 / d``.

    Args:
        embeddings: Floating tensor of shape ``(..., N, d)``: ``N >= 1`` samples of dimension ``d >= 1``.

    Returns:
        Tensor of shape ``(...)`` in ``[0, 2 - 1 / d]``; 0 for a single row: float32 for float16 and bfloat16 input,
        else the input's dtype. NaN for a matrix with a non-finite value.

    Raises:
        TypeError: If ``embeddings`` is not a real floating tensor.
        ValueError: If ``embeddings`` has fewer than two dimensions, no rows or no columns.

    Example:
        >>> import torch
        >>> spread_out(torch.ones(3, 4))  # all rows alike: 1 + (1 - 1 / 4)
        tensor(1.7500)

    Source:
        Zhang et al. (GOR), ICCV 2017, https://arxiv.org/abs/1708.06320, whose pairs of non-matching descriptors are
        here all pairs of rows.
    """
    check_embeddings(embeddings)
    with full_precision(embeddings):
        rows = normalize_rows(embeddings)
        n, d = rows.shape[-2:]
        pairs = max(n * (n - 1), 1)
        if n <= d:
            products = off_diagonal(rows @ rows.mT)
            first, second = products.sum((-2, -1)), products.square().sum((-2, -1))
        else:  # the same sums without the N x N matrix
            lengths = rows.square().sum(-1)
            first = rows.sum(-2).square().sum(-1) - lengths.sum(-1)
            second = (rows.mT @ rows).square().sum((-2, -1)) - lengths.square().sum(-1)
        return (first / pairs).square() + (second / pairs - 1 / d).relu()
