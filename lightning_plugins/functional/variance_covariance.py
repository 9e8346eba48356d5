"""The variance and covariance terms of VICReg."""

import torch
from torch import Tensor

from lightning_plugins._checks import check_positive_number
from lightning_plugins.functional.spectrum import at_least_float32, check_embeddings, full_precision


def variance_hinge(embeddings: Tensor, *, target: float = 1.0, eps: float = 1e-4) -> Tensor:
    """Mean shortfall of the features' standard deviations from a target: ``mean(relu(target - std))``.

    ``std`` is ``sqrt(var + eps)`` with the unbiased variance over the rows; for a single row it is 0. A constant
    feature has a zero rather than an infinite gradient.

    Args:
        embeddings: Floating tensor of shape ``(..., N, d)``: ``N >= 1`` samples of dimension ``d >= 1``.
        target: Features with at least this standard deviation do not contribute; above 0.
        eps: Added to the variances, above 0.

    Returns:
        Tensor of shape ``(...)`` in ``[0, target]``: float32 for float16 and bfloat16 input, else the input's dtype.
        NaN for a matrix with a non-finite value.

    Raises:
        TypeError: If ``embeddings`` is not a real floating tensor, or ``target`` or ``eps`` not a number.
        ValueError: If ``embeddings`` has fewer than two dimensions, no rows or no columns; if a number is not above 0.

    Example:
        >>> variance_hinge(torch.zeros(4, 3))  # 1 - sqrt(0.0001)
        tensor(0.9900)

    Source:
        Bardes, Ponce and LeCun (VICReg), ICLR 2022, https://arxiv.org/abs/2105.04906, and its code.
    """
    check_embeddings(embeddings)
    check_positive_number("target", target)
    check_positive_number("eps", eps)
    with full_precision(embeddings):
        centred = centre_rows(embeddings)
        variance = centred.square().sum(-2) / max(centred.shape[-2] - 1, 1)
        return (target - (variance + eps).sqrt()).relu().mean(-1)


def covariance_penalty(embeddings: Tensor) -> Tensor:
    """Sum of the squared covariances of different features over the number of features.

    Args:
        embeddings: Floating tensor of shape ``(..., N, d)``: ``N >= 1`` samples of dimension ``d >= 1``.

    Returns:
        Tensor of shape ``(...)``, at least 0; 0 for a single row: float32 for float16 and bfloat16 input, else the
        input's dtype. NaN for a matrix with a non-finite value.

    Raises:
        TypeError: If ``embeddings`` is not a real floating tensor.
        ValueError: If ``embeddings`` has fewer than two dimensions, no rows or no columns.

    Example:
        >>> covariance_penalty(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))  # covariance 2, above and below the diagonal
        tensor(4.)

    Source:
        Bardes, Ponce and LeCun (VICReg), ICLR 2022, https://arxiv.org/abs/2105.04906, and its code.
    """
    check_embeddings(embeddings)
    with full_precision(embeddings):
        centred = centre_rows(embeddings)
        covariance = centred.mT @ centred / max(centred.shape[-2] - 1, 1)
        return off_diagonal(covariance).square().sum((-2, -1)) / covariance.shape[-1]


def centre_rows(embeddings: Tensor) -> Tensor:
    """Subtract the mean row; for nearby rows no accuracy is lost beyond their own rounding.

    Args:
        embeddings: Floating tensor of shape ``(..., N, d)``.

    Returns:
        Tensor of the same shape, in float32 for float16 and bfloat16 input, else in the input's dtype.

    Example:
        >>> centre_rows(torch.tensor([[1.0], [3.0]]))
        tensor([[-1.],
                [ 1.]])
    """
    rows = at_least_float32(embeddings)
    return rows - rows.mean(-2, keepdim=True)


def off_diagonal(matrix: Tensor) -> Tensor:
    """Square matrices with zeroed diagonals; subtracting the diagonal from the sum would lose small entries.

    Args:
        matrix: Tensor of shape ``(..., n, n)``.

    Returns:
        Tensor of the same shape.

    Example:
        >>> off_diagonal(torch.ones(2, 2))
        tensor([[0., 1.],
                [1., 0.]])
    """
    return matrix.masked_fill(torch.eye(matrix.shape[-1], dtype=torch.bool, device=matrix.device), 0)
