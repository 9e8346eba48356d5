"""Means over tasks with confidence intervals."""

from typing import NamedTuple

import torch
from torch import Tensor

_NORMAL = 1.96  # 95 % of a normal distribution lie within this many standard deviations of its mean


class MeanWithInterval(NamedTuple):
    """A mean over tasks and the half-width of its 95 % interval.

    Attributes:
        mean: The mean.
        interval: 1.96 times the standard deviation between tasks over the square root of their number; NaN for one
            task.
    """

    mean: Tensor
    interval: Tensor


def mean_with_interval(total: Tensor, squares: Tensor, count: Tensor) -> MeanWithInterval:
    """Both from sums, sums of squares and the number of tasks; NaN where there are too few tasks."""
    mean = total / count
    variance = ((squares - total * mean) / (count - 1)).clamp_min(0.0)  # rounding can make it negative
    interval = _NORMAL * (variance / count).sqrt()
    return MeanWithInterval(mean, torch.where(count > 1, interval, torch.nan))
