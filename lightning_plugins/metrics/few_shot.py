"""Accuracy of few-shot classification and its interval over tasks."""

import torch
from torch import Tensor

from lightning_plugins.functional.tensors import check_floating, check_integers
from lightning_plugins.metrics._sums import SumMetric
from lightning_plugins.metrics._tasks import mean_with_interval


class _PerTask(SumMetric):
    """Sums over tasks of each task's accuracy and of its square."""

    is_differentiable = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    total: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add the tasks of one batch.

        Args:
            outputs: Floating tensor of shape ``(tasks, samples, classes)``: logits or probabilities.
            targets: Tensor of integers of shape ``(tasks, samples)``.

        Raises:
            TypeError: If ``outputs`` is not floating or ``targets`` not integral.
            ValueError: If the shapes do not fit, or tasks have no samples.
        """
        _check(outputs, targets)
        accuracies = (outputs.argmax(-1) == targets).to(self.total.dtype).mean(1)
        self.total = self.total + accuracies.sum()
        self.squares = self.squares + accuracies.square().sum()
        self.count = self.count + len(accuracies)


class FewShotAccuracy(_PerTask):
    """Mean over tasks of the fraction of correctly classified query samples, in ``[0, 1]``.

    Exact over batches and ranks, even with unequal numbers of tasks: sums and counts are stored. Log it together with
    `FewShotAccuracyInterval`, with which it shares its sums in a ``MetricCollection``.

    Example:
        >>> metric = FewShotAccuracy()
        >>> outputs = torch.tensor([[[0.9, 0.1], [0.2, 0.8]], [[0.7, 0.3], [0.6, 0.4]]])  # two tasks of two samples
        >>> metric(outputs, torch.tensor([[0, 1], [0, 1]]))
        tensor(0.7500, dtype=torch.float64)
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """Mean accuracy of all tasks of all batches and ranks.

        Returns:
            Scalar; NaN if there was no task.
        """
        return mean_with_interval(self.total, self.squares, self.count).mean


class FewShotAccuracyInterval(_PerTask):
    """Half-width of the 95 % interval of `FewShotAccuracy` over tasks.

    With ``n`` tasks it is ``1.96 * s / sqrt(n)``, ``s`` the sample standard deviation (with ``n - 1``) of the tasks'
    accuracies. Published tables use 600 tasks. Exact over batches and ranks.

    Example:
        >>> metric = FewShotAccuracyInterval()
        >>> outputs = torch.tensor([[[0.9, 0.1], [0.2, 0.8]], [[0.7, 0.3], [0.6, 0.4]]])
        >>> metric(outputs, torch.tensor([[0, 1], [0, 1]]))  # of the accuracies 1 and 0.5
        tensor(0.4900, dtype=torch.float64)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """Half-width over all tasks of all batches and ranks.

        Returns:
            Scalar, at least 0; NaN for fewer than two tasks.
        """
        return mean_with_interval(self.total, self.squares, self.count).interval


def _check(outputs: Tensor, targets: Tensor) -> None:
    if isinstance(outputs, Tensor) and not outputs.is_floating_point():
        raise TypeError(f"`outputs` must be a floating tensor, logits or probabilities, got {outputs.dtype}")
    check_floating("outputs", outputs)
    check_integers("targets", targets, "integers, the numbers of the classes")
    if outputs.ndim != 3:
        hint = "; for one task, `outputs.unsqueeze(0), targets.unsqueeze(0)`" if outputs.ndim == 2 else ""
        raise ValueError(f"`outputs` must have shape (tasks, samples, classes), got {tuple(outputs.shape)}{hint}")
    if targets.shape != outputs.shape[:2]:
        raise ValueError(
            f"`targets` must have shape (tasks, samples), {tuple(outputs.shape[:2])} as `outputs` has, got"
            f" {tuple(targets.shape)}"
        )
    if not outputs.shape[1] or not outputs.shape[2]:
        raise ValueError(f"`outputs` must have a sample and a class in every task, got {tuple(outputs.shape)}")
