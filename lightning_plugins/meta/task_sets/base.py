"""Sources of few-shot tasks: the interface and shared checks."""

from typing import Literal

from torch import Generator, Tensor

from lightning_plugins._arguments import check_arguments
from lightning_plugins._checks import check_instance, check_positive_int

Split = Literal["train", "val", "test"]
_MOST_TASKS = 10**6
Batch = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


class TaskSet:
    """Base class: a distribution over tasks, from which `EpisodeLoader` draws.

    An implementation defines `sample`, whose randomness must come only from the given generator, so that the same seed
    gives the same tasks in every process.

    Example:
        >>> class Lines(TaskSet):
        ...     def sample(self, tasks, generator):
        ...         slope = torch.randn(tasks, 1, 1, generator=generator)
        ...         x = torch.randn(tasks, 4, 1, generator=generator)
        ...         return (x[:, :2], slope * x[:, :2]), (x[:, 2:], slope * x[:, 2:])
        >>> import torch
        >>> (support_x, support_y), (query_x, query_y) = Lines().sample(3, torch.Generator().manual_seed(0))
        >>> support_x.shape, query_y.shape
        (torch.Size([3, 2, 1]), torch.Size([3, 2, 1]))
    """

    def sample(self, tasks: int, generator: Generator) -> Batch:
        """Draw tasks.

        Args:
            tasks: How many.
            generator: The random generator.

        Returns:
            ``((support_x, support_y), (query_x, query_y))``, tensors of shapes ``(tasks, samples, ...)``.

        Raises:
            NotImplementedError: In this base class.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `sample(tasks, generator)`")


def check_draw(tasks: int, generator: Generator) -> None:
    """Raise an error for arguments with which no tasks can be drawn.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If there is no task to draw, or too many for a batch.
    """
    check_instance("generator", generator, Generator, "a torch Generator")
    if check_positive_int("tasks", tasks) > _MOST_TASKS:
        raise ValueError(f"`tasks` must be at most {_MOST_TASKS}, the tasks of one batch, got {tasks}")


def check_ways(ways: int) -> int:
    """Raise an error for tasks with fewer than two classes."""
    check_arguments(check_ways, locals())
    if check_positive_int("ways", ways) < 2:
        raise ValueError("`ways` must be at least 2, got 1: with one class there is nothing to tell apart")
    return ways
