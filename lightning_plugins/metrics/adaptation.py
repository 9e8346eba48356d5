"""Metrics on the query samples of tasks after every inner step."""

import torch
from torch import Tensor

from lightning_plugins._checks import check_non_negative_int, check_room
from lightning_plugins.functional.tensors import check_floating
from lightning_plugins.metrics._sums import SumMetric
from lightning_plugins.metrics._tasks import MeanWithInterval, mean_with_interval


class AdaptationCurve(SumMetric):
    """Mean over tasks, with its 95 % interval, of a value per task and inner step.

    Values are, for example, the losses of `lightning_plugins.meta.InnerLoop.curve`, or accuracies of its outputs. Exact
    over batches and ranks. `lightning_plugins.plots.adaptation_figure` plots it.

    Args:
        steps: Number of inner steps; there is one more value, before the first.

    Raises:
        TypeError: If ``steps`` is not an int.
        ValueError: If ``steps`` is negative.

    Example:
        >>> metric = AdaptationCurve(steps=2)
        >>> metric.update(torch.tensor([[4.0, 2.0, 1.0], [6.0, 2.0, 1.0]]))  # two tasks
        >>> curve = metric.compute()
        >>> curve.mean
        tensor([5., 2., 1.], dtype=torch.float64)
        >>> curve.interval  # 1.96 * sqrt(2) / sqrt(2), and two steps after which the tasks do not differ
        tensor([1.9600, 0.0000, 0.0000], dtype=torch.float64)
    """

    total: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = check_non_negative_int("steps", steps)
        check_room("steps", steps)
        self.add_state("total", torch.zeros(steps + 1, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(steps + 1, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add the tasks of one batch.

        Args:
            values: Floating tensor of shape ``(tasks, steps + 1)``.

        Raises:
            TypeError: If it is not floating.
            ValueError: If it has another shape.
        """
        check_floating("values", values)
        if values.ndim != 2 or values.shape[1] != self.steps + 1:
            raise ValueError(
                f"`values` must have shape (tasks, {self.steps + 1}), one number before the first step and one after"
                f" each, got {tuple(values.shape)}"
            )
        wide = values.detach().to(self.total.dtype)
        self.total = self.total + wide.sum(0)
        self.squares = self.squares + wide.square().sum(0)
        self.count = self.count + len(wide)

    def compute(self) -> MeanWithInterval:
        """Mean and half-width of the interval, over all tasks of all batches and ranks.

        Returns:
            ``mean`` and ``interval``, shape ``(steps + 1,)`` each; NaN where there are too few tasks.
        """
        return mean_with_interval(self.total, self.squares, self.count)
