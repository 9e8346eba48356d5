"""Ordering of positions with ties, and correlations of rows.

Ties are broken in expectation, as if tied positions were drawn at random.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_CACHED = 2**17  # block size for which copies stay in the CPU caches


def expected_hits(maps: Tensor, truth: Tensor, size: Tensor) -> Tensor:
    """Count true positions among the largest of each map.

    Args:
        maps: Shape ``(B, L)``.
        truth: Bools of shape ``(B, L)``.
        size: Number of positions selected from each map, shape ``(B,)``.

    Returns:
        Shape ``(B,)``, in the dtype of ``maps``.
    """
    return hits_above(maps, truth, _nth_largest(maps, size.clamp_min(1).long()), size)


def hits_above(maps: Tensor, truth: Tensor, least: Tensor, size: Tensor | int) -> Tensor:
    """Count true positions among the ``size`` largest; ``least`` of shape ``(B, 1)`` is the smallest of these."""
    above, tied = maps > least, maps == least
    wanted = size - count(above, maps)  # of the tied positions
    return count(above & truth, maps) + count(tied & truth, maps) * wanted / count(tied, maps).clamp_min(1)


def count(chosen: Tensor, maps: Tensor) -> Tensor:
    """Count the positions in each row, in the dtype of ``maps``: integer division would give the default dtype."""
    return chosen.sum(1, dtype=maps.dtype)


def pairs_in_order(maps: Tensor, truth: Tensor) -> Tensor:
    """Count pairs of a true and another position in which the former is larger, minus those in which it is smaller.

    Args:
        maps: Shape ``(B, L)``.
        truth: Bools of shape ``(B, L)``.

    Returns:
        Integers of shape ``(B,)``; ties count as neither.
    """
    # In blocks on a CPU, where allocating large temporaries takes as long as the sort.
    rows = max(1, _CACHED // maps.shape[1]) if maps.device.type == "cpu" else max(1, len(maps))
    return torch.cat([_pairs(*piece) for piece in zip(maps.split(rows), truth.split(rows), strict=True)])


def _pairs(maps: Tensor, truth: Tensor) -> Tensor:
    ordered, order = maps.sort(1)
    hit = truth.gather(1, order)
    begins = torch.arange(1, maps.shape[1], device=maps.device) * (ordered[:, 1:] != ordered[:, :-1])
    first = F.pad(begins, (1, 0)).cummax(1).values  # number of positions smaller than each
    smaller = F.pad(hit.cumsum(1), (1, 0)).gather(1, first)  # and number of true ones among them
    # A hit is larger than `first - smaller` others; each of the others is larger than `smaller` hits.
    return (hit * first).sum(1) - smaller.sum(1)


def _nth_largest(maps: Tensor, size: Tensor) -> Tensor:
    if maps.device.type == "cpu":  # selecting takes a third of the time of sorting, without synchronising for the sizes
        found = [row.kthvalue(len(row) - n + 1).values for row, n in zip(maps, size.tolist(), strict=True)]
        return torch.stack(found)[:, None] if found else maps[:, :1]
    return maps.sort(1, descending=True).values.gather(1, size[:, None] - 1)


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
