"""Correlations of rows."""

import torch
from torch import Tensor


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlate the rows of two matrices.

    Args:
        a: Shape ``(B, n)``.
        b: Shape ``(B, n)``.

    Returns:
        Shape ``(B,)``, in ``[-1, 1]``; NaN where a row is constant up to rounding, or not finite.

    Example:
        >>> pearson(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0, 4.0, 6.0]])).round(decimals=3)
        tensor([1.])
    """
    centred = []
    for rows in (a, b):
        mean = rows.mean(1, keepdim=True)
        away = rows - mean
        rounding = 8 * torch.finfo(rows.dtype).eps * rows.abs().amax(1, keepdim=True)
        away = torch.where(away.abs().amax(1, keepdim=True) <= rounding, torch.nan, away)
        centred.append(away / away.norm(dim=1, keepdim=True))
    correlation: Tensor = (centred[0] * centred[1]).sum(1).clamp(-1, 1)
    return correlation


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Correlate the ranks of the rows of two matrices; tied values share the mean of their ranks.

    Args:
        a: Shape ``(B, n)``.
        b: Shape ``(B, n)``.

    Returns:
        Shape ``(B,)``, in ``[-1, 1]``; NaN where a row is constant or not finite.

    Example:
        >>> spearman(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[3.0, 5.0, 6.0]])).round(decimals=3)
        tensor([1.])
    """
    finite = (torch.isfinite(a) & torch.isfinite(b)).all(1)
    return torch.where(finite, pearson(_ranks(a), _ranks(b)), torch.nan)


def _ranks(rows: Tensor) -> Tensor:
    rows = rows.contiguous()
    ordered = rows.sort(1).values
    return (torch.searchsorted(ordered, rows) + torch.searchsorted(ordered, rows, right=True)).to(rows) / 2
