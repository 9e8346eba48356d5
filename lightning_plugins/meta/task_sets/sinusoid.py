"""Sinusoid regression, the classic few-shot regression test."""

import math

import torch
from torch import Generator, Tensor

from lightning_plugins._checks import check_positive_int
from lightning_plugins.meta.task_sets.base import Batch, TaskSet, check_draw

AMPLITUDES = (0.1, 5.0)
PHASES = (0.0, math.pi)
INPUTS = (-5.0, 5.0)


class Sinusoid(TaskSet):
    """Tasks ``y = amplitude * sin(x - phase)``, without noise.

    The amplitude of a task is uniform in ``[0.1, 5]``, its phase in ``[0, pi]``, and the inputs in ``[-5, 5]``.

    Args:
        shots: Number of support samples of a task.
        queries: Number of query samples of a task.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If one is less than 1.

    Example:
        >>> (support_x, support_y), query = Sinusoid(shots=5).sample(25, torch.Generator().manual_seed(0))
        >>> support_x.shape, support_y.shape, query[0].shape
        (torch.Size([25, 5, 1]), torch.Size([25, 5, 1]), torch.Size([25, 10, 1]))

    Source:
        Finn, Abbeel and Levine, ICML 2017, https://arxiv.org/abs/1703.03400, section 5.1.
    """

    def __init__(self, shots: int = 10, queries: int = 10) -> None:
        self.shots = check_positive_int("shots", shots)
        self.queries = check_positive_int("queries", queries)

    def sample(self, tasks: int, generator: Generator) -> Batch:
        """Draw tasks, all at once.

        Args:
            tasks: How many.
            generator: The random generator.

        Returns:
            ``((support_x, support_y), (query_x, query_y))``, of shape ``(tasks, shots, 1)`` each and
            ``(tasks, queries, 1)`` each.
        """
        check_draw(tasks, generator)
        amplitude = _uniform((tasks, 1, 1), AMPLITUDES, generator)
        phase = _uniform((tasks, 1, 1), PHASES, generator)
        x = _uniform((tasks, self.shots + self.queries, 1), INPUTS, generator)
        y = amplitude * (x - phase).sin()
        sizes = [self.shots, self.queries]
        (support_x, query_x), (support_y, query_y) = x.split(sizes, dim=1), y.split(sizes, dim=1)
        return (support_x, support_y), (query_x, query_y)


def _uniform(shape: tuple[int, ...], bounds: tuple[float, float], generator: Generator) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)
