"""Sums of products of features and targets, by fold.

The state is one tensor of shape ``(folds + 1, p, p)``. Slab ``f`` is ``Z.T @ Z`` over the rows ``Z = [1, x, y]`` of
fold ``f``, with a shift subtracted from all columns but the first. The last slab holds that shift in its first row and,
in its first entry, whether there is one: a single tensor, so that a reduction over processes has the shift together
with the sums that depend on it.
"""

import torch
from torch import Tensor


def empty_moments(folds: int, columns: int) -> Tensor:
    """Empty moments, shape ``(folds + 1, 1 + columns, 1 + columns)``, float64."""
    return torch.zeros(folds + 1, 1 + columns, 1 + columns, dtype=torch.float64)


def add_rows(moments: Tensor, rows: Tensor, fold_of_row: Tensor) -> Tensor:
    """Add rows to the moments of their folds.

    Args:
        moments: As above; not changed.
        rows: Features and targets, shape ``(N, columns)``, float64.
        fold_of_row: Integer tensor of shape ``(N,)``.

    Returns:
        The new moments.
    """
    if not len(rows):
        return moments
    moments = moments.clone()
    shift = torch.where(moments[-1, 0, :1] > 0, moments[-1, 0, 1:], rows.mean(dim=0))
    moments[-1, 0, 0].fill_(1.0)  # assigning a number copies it to the device, which waits
    moments[-1, 0, 1:] = shift
    ones = torch.ones(len(rows), 1, dtype=rows.dtype, device=rows.device)
    augmented = torch.cat([ones, rows - shift], dim=1)
    for fold in range(len(moments) - 1):
        inside = fold_of_row == fold
        own = augmented * inside[:, None] if rows.is_cuda else augmented[inside]  # indexing synchronises a GPU
        moments[fold].addmm_(own.T, own)
    return moments


def merge_moments(stack: Tensor) -> Tensor:
    """Merge the moments of several processes, each with its own shift.

    Args:
        stack: Shape ``(processes, folds + 1, p, p)``.

    Returns:
        Moments with the shift of the first process that has one.
    """
    has_rows = stack[:, -1, 0, 0] > 0
    first = int(has_rows.long().argmax())
    shift = stack[first, -1, 0].clone()
    offset = torch.where(has_rows[:, None], stack[:, -1, 0] - shift, 0.0)[:, None, :]  # (processes, 1, p); 0 in front
    sums, offset = stack[:, :-1], torch.cat([torch.zeros_like(offset[..., :1]), offset[..., 1:]], dim=-1)
    totals = sums[:, :, 0, :]
    outer = offset[..., :, None] * totals[..., None, :]
    moved = sums + outer + outer.mT + totals[..., :1, None] * offset[..., :, None] * offset[..., None, :]
    merged = torch.empty_like(stack[0])
    merged[:-1] = moved.sum(dim=0)
    merged[-1] = 0.0
    merged[-1, 0] = shift
    return merged


def standardised(sums: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Sums of products of ``(z - mean) / scale``, for all columns but the first.

    Args:
        sums: ``Z.T @ Z`` with ``Z = [1, z]``, shape ``(p, p)``.
        mean: Shape ``(p - 1,)``.
        scale: Shape ``(p - 1,)``.

    Returns:
        The sums, shape ``(p, p)``.
    """
    offset = torch.cat([mean.new_zeros(1), -mean])
    outer = offset[:, None] * sums[0]
    factor = torch.cat([scale.new_ones(1), 1 / scale])
    return (sums + outer + outer.mT + sums[0, 0] * offset[:, None] * offset) * factor[:, None] * factor


def mean_and_scale(sums: Tensor, scaled: int) -> tuple[Tensor, Tensor]:
    """Mean of each column and the standard deviation of the first ``scaled`` ones; 1 for those that are constant.

    Args:
        sums: Shape ``(p, p)``, as above.
        scaled: Number of leading columns to scale.

    Returns:
        Mean and scale, each of shape ``(p - 1,)``.
    """
    mean = sums[0, 1:] / sums[0, 0]
    square = sums.diagonal()[1:] / sums[0, 0]
    variance = square - mean.square()
    eps = torch.finfo(sums.dtype).eps
    scale = torch.where(variance > 64 * eps * square, variance.clamp_min(0.0).sqrt(), 1.0)
    return mean, torch.where(torch.arange(len(mean), device=mean.device) < scaled, scale, 1.0)
