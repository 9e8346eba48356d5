"""Batches of tasks: inputs and targets of one or several tensors, for tasks of equal or different sizes."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

Nested = Tensor | tuple[Any, ...] | Mapping[str, Any]


def leaves(value: object) -> list[Tensor]:
    """The tensors in a tensor, tuple or mapping, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple) and value:
        return [leaf for part in value for leaf in leaves(part)]
    if isinstance(value, Mapping) and value:
        return [leaf for part in value.values() for leaf in leaves(part)]
    raise TypeError(type(value).__name__)


def rebuilt(like: object, tensors: Iterator[Tensor]) -> Any:
    """Other tensors in the structure of ``like``."""
    if isinstance(like, tuple):
        return tuple(rebuilt(part, tensors) for part in like)
    if isinstance(like, Mapping):
        return {name: rebuilt(part, tensors) for name, part in like.items()}
    return next(tensors)


class TaskBatch(NamedTuple):
    """Tasks in groups of consecutive ones whose tensors have the same shapes.

    Attributes:
        groups: The tensors of each group, over all parts, with a first dimension for the tasks.
        structures: The structures of a task's parts.
    """

    groups: tuple[tuple[Tensor, ...], ...]
    structures: tuple[Any, ...]

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return sum(len(group[0]) for group in self.groups)

    @property
    def first(self) -> Tensor:
        """A tensor of the first task, for its device."""
        return self.groups[0][0]

    def unpacked(self, tensors: Sequence[Tensor]) -> list[Any]:
        """Assemble the parts of a task from its tensors."""
        remaining = iter(tensors)
        return [rebuilt(structure, remaining) for structure in self.structures]

    def of_first_task(self) -> list[Any]:
        """The parts of the first task, detached."""
        return self.unpacked([tensor[0].detach() for tensor in self.groups[0]])

    def with_tensors(self, groups: Sequence[tuple[Tensor, ...]]) -> "TaskBatch":
        """The same structure with other tensors."""
        return self._replace(groups=tuple(groups))


def batch_of(*parts: object) -> TaskBatch:
    """Combine parts, each with a first dimension for the tasks or a list with one entry per task."""
    structures = tuple(part[0] if isinstance(part, list) else part for part in parts)
    if not any(isinstance(part, list) for part in parts):
        return TaskBatch((tuple(leaf for part in parts for leaf in leaves(part)),), structures)
    count = next(len(part) for part in parts if isinstance(part, list))
    tasks = [[leaf for part in parts for leaf in _of_task(part, number)] for number in range(count)]
    groups = groupby(tasks, key=lambda tensors: [(tensor.shape, tensor.dtype) for tensor in tensors])
    return TaskBatch(tuple(tuple(map(torch.stack, zip(*group, strict=True))) for _, group in groups), structures)


def tasks_together(parts: Sequence[Any]) -> Any:
    """Combine parts of single tasks, with a first dimension of 1; as a list if they differ in size."""
    rows = [leaves(part) for part in parts]
    if any([leaf.shape for leaf in row] != [leaf.shape for leaf in rows[0]] for row in rows):
        return [rebuilt(part, iter([leaf[0] for leaf in row])) for part, row in zip(parts, rows, strict=True)]
    return rebuilt(parts[0], map(torch.cat, zip(*rows, strict=True)))


def joined(pieces: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    """Concatenate results of groups or chunks over tasks; a list of tasks if they differ in size."""
    if len(pieces) == 1:
        return tuple(pieces[0])
    results = []
    for parts in zip(*pieces, strict=True):
        same = len({part.shape[1:] for part in parts}) == 1
        results.append(torch.cat(parts) if same else [task for part in parts for task in part])
    return tuple(results)


def _of_task(part: object, number: int) -> list[Tensor]:
    return leaves(part[number]) if isinstance(part, list) else [leaf[number] for leaf in leaves(part)]
