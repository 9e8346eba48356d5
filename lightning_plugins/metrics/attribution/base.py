"""Base class of attribution metrics: sums per class, a random baseline, and skill."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_plugins._checks import check_bool, check_positive_int, check_room
from lightning_plugins.functional.tensors import check_integers
from lightning_plugins.metrics._sums import SumMetric


class AttributionScore(NamedTuple):
    """A mean score and that of random maps.

    Attributes:
        score: The mean over samples; NaN without any.
        random: The mean, or expected, score of random maps on the same samples.
        skill: ``(score - random) / (best - random)``: 1 for the best possible score, 0 for a random one.
        samples: Number of samples with a score.
        undefined: Number of samples without a score: an empty mask, a non-finite or a constant map.
    """

    score: Tensor
    random: Tensor
    skill: Tensor
    samples: Tensor
    undefined: Tensor


class AttributionMetric(SumMetric):
    """Base class of metrics that are means over samples.

    The states are sums in double precision, one per class, so the result is exact however samples are split into
    batches or over ranks.

    Args:
        num_classes: Number of classes, for results per class.
        per_class: Whether to return one result per class; needs ``num_classes``.

    Raises:
        TypeError: If ``num_classes`` is not an int.
        ValueError: If it is less than 1, or missing although ``per_class`` is set.
    """

    best = 1.0  # the best possible score
    total: Tensor
    random_total: Tensor
    count: Tensor
    undefined: Tensor

    def __init__(self, *, num_classes: int | None = None, per_class: bool = False) -> None:
        super().__init__()
        size = rows_of_sums(num_classes, per_class)
        self.num_classes, self.per_class = num_classes, per_class
        for name in ("total", "random_total"):
            self.add_state(name, torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("count", "undefined"):
            self.add_state(name, torch.zeros(size, dtype=torch.long), dist_reduce_fx="sum")

    def compute(self) -> AttributionScore:
        """Mean over all samples of all batches and ranks.

        Returns:
            Scalars, or tensors of shape ``(num_classes,)`` with ``per_class``.
        """
        sums = (self.total, self.random_total, self.count, self.undefined)
        total, baseline, count, undefined = sums if self.per_class else (part.sum() for part in sums)
        score, random = total / count, baseline / count
        return AttributionScore(score, random, skill_of(score, random, self.best), count, undefined)

    def add(self, scores: Tensor, random: Tensor, classes: Tensor | None, *, name: str = "classes") -> None:
        """Add samples to the sums of their classes.

        Args:
            scores: Shape ``(B,)``; NaN for a sample without a score.
            random: The scores of random maps, shape ``(B,)``.
            classes: Integers of shape ``(B,)``; required if the metric has ``num_classes``.
            name: Argument name of ``classes``, for messages.

        Raises:
            TypeError: If ``classes`` is not of integers.
            ValueError: If classes are missing, or of another shape or range.
        """
        index = class_rows(name, classes, len(scores), self.num_classes).to(self.count.device)
        defined = (torch.isfinite(scores) & torch.isfinite(random)).to(index.device)
        for state, values in (("total", scores), ("random_total", random)):
            sums = getattr(self, state)
            kept = torch.where(defined, values.detach().to(sums), 0.0)
            setattr(self, state, sums.index_add(0, index, kept))
        self.count = self.count.index_add(0, index, defined.long())
        self.undefined = self.undefined.index_add(0, index, (~defined).long())


def rows_of_sums(num_classes: int | None, per_class: bool) -> int:
    """Return the number of rows of a metric's sums: one per class, or one for all samples.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If there is no class, or their number is missing although ``per_class`` is set.
    """
    if check_bool("per_class", per_class) and num_classes is None:
        raise ValueError("`per_class=True` needs `num_classes`, so that every rank has the same sums, got None")
    size = 1 if num_classes is None else check_positive_int("num_classes", num_classes)
    check_room("num_classes", size)
    return size


def class_rows(name: str, classes: Tensor | None, rows: int, num_classes: int | None) -> Tensor:
    """The row of the sums for each sample.

    Args:
        name: The argument's name, for the message.
        classes: Integers of shape ``(rows,)``, or None for a metric without classes.
        rows: Number of samples.
        num_classes: Number of classes of the metric; None to treat all samples as one class.

    Returns:
        Integers of shape ``(rows,)``.

    Raises:
        TypeError: If ``classes`` is not of integers.
        ValueError: If classes are missing, or of another shape or range.
    """
    if num_classes is None:
        return torch.zeros(rows, dtype=torch.long)
    if classes is None:
        raise ValueError(f"`{name}` must be given to a metric with `num_classes={num_classes}`, got None")
    check_integers(name, classes, "a tensor of integers")
    if classes.shape != (rows,):
        raise ValueError(f"`{name}` must have shape ({rows},), got {tuple(classes.shape)}")
    on_host = classes.device.type == "cpu"  # on other devices reading the values would synchronise
    if on_host and rows and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
        raise ValueError(
            f"`{name}` must be in 0 to {num_classes - 1}, the classes of `num_classes={num_classes}`, got"
            f" {int(classes.min())} to {int(classes.max())}"
        )
    return classes.long()


def skill_of(score: Tensor, random: Tensor, best: float) -> Tensor:
    """Scale a score so that random maps have 0 and the best possible score is 1; NaN if these are equal."""
    room = best - random
    return torch.where(room == 0, torch.nan, (score - random) / room)
