"""N-way K-shot tasks from any labelled dataset."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from lightning_plugins._checks import check_positive_int
from lightning_plugins.meta.task_sets._labels import labels_of, names_of
from lightning_plugins.meta.task_sets.base import Batch, TaskSet, check_draw, check_ways


class LabelledDataset(Protocol):
    """Any map-style dataset of pairs ``(input, label)``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class FewShot(TaskSet):
    """N-way K-shot classification: every task has ``ways`` classes drawn from a labelled dataset.

    The labels are read from ``targets``, ``labels`` or ``tensors`` of the dataset, including through `Subset` and
    `ConcatDataset`; failing that, all samples are loaded once. Within a task the classes have the labels 0 to
    ``ways - 1`` in random order; samples are ordered by class, and support and query samples are distinct.

    Args:
        dataset: Pairs ``(input, label)``: inputs are tensors of one shape, arrays or numbers; labels any hashable
            values.
        ways: Number of classes in a task.
        shots: Number of support samples of each class.
        queries: Number of query samples of each class.
        classes: Labels of the classes to draw from, such as those for validation; all by default.

    Raises:
        TypeError: If the dataset does not return pairs, or a number is not an int.
        ValueError: If a number is out of range, a class unknown or too small, or there are fewer than ``ways``.

    Example:
        >>> digits = torch.utils.data.TensorDataset(torch.arange(40.0), torch.arange(40) % 10)
        >>> tasks = FewShot(digits, ways=3, shots=1, queries=2)
        >>> (support_x, support_y), (query_x, query_y) = tasks.sample(1, torch.Generator().manual_seed(0))
        >>> support_y, query_y
        (tensor([[0, 1, 2]]), tensor([[0, 0, 1, 1, 2, 2]]))
        >>> support_x % 10, query_x % 10  # the digits that these labels stand for in this task
        (tensor([[4., 1., 7.]]), tensor([[4., 4., 1., 1., 7., 7.]]))
    """

    def __init__(
        self,
        dataset: LabelledDataset,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        *,
        classes: Sequence[Any] | None = None,
    ) -> None:
        self.dataset = dataset
        self.ways = check_ways(ways)
        self.shots = check_positive_int("shots", shots)
        self.queries = check_positive_int("queries", queries)
        members = _by_class(labels_of(dataset), classes)
        if len(members) < ways:
            raise ValueError(f"`ways` must be at most the number of classes, {len(members)}, got {ways}")
        names = names_of(dataset, list(members))
        if small := [f"{names[label]} with {len(found)}" for label, found in members.items() if self._lacks(found)]:
            raise ValueError(
                f"`shots + queries` must be at most the size of every class, got {shots} + {queries} and"
                f" {', '.join(small[:3])}{', …' if len(small) > 3 else ''}; leave out classes with `classes`"
            )
        self.members = [torch.tensor(found) for found in members.values()]

    def sample(self, tasks: int, generator: Generator) -> Batch:
        """Draw tasks.

        Args:
            tasks: How many.
            generator: The random generator.

        Returns:
            ``((support_x, support_y), (query_x, query_y))`` of shapes ``(tasks, ways * shots, ...)`` and
            ``(tasks, ways * queries, ...)``.
        """
        check_draw(tasks, generator)
        indices = torch.stack([self._draw(generator) for _ in range(tasks)])
        parts = []
        for piece in indices.split([self.shots, self.queries], dim=2):
            x = _stacked([self._load(int(index)) for index in piece.flatten()])
            y = torch.arange(self.ways).repeat_interleave(piece.shape[2]).expand(tasks, -1)
            parts.append((x.unflatten(0, (tasks, -1)), y))
        return parts[0], parts[1]

    def _lacks(self, found: list[int]) -> bool:
        return len(found) < self.shots + self.queries

    def _draw(self, generator: Generator) -> Tensor:
        """Indices of a task's samples: shape ``(ways, shots + queries)``."""
        classes = torch.randperm(len(self.members), generator=generator)[: self.ways].tolist()
        count = self.shots + self.queries
        drawn = [
            self.members[number][torch.randperm(len(self.members[number]), generator=generator)[:count]]
            for number in classes
        ]
        return torch.stack(drawn)

    def _load(self, index: int) -> Tensor:
        x = self.dataset[index][0]
        try:
            return torch.as_tensor(x)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"`dataset` must give tensors, got {type(x).__name__};"
                " give it a transform such as torchvision's `ToTensor()`"
            ) from error


def _stacked(inputs: list[Tensor]) -> Tensor:
    shapes = {tuple(x.shape) for x in inputs}
    if len(shapes) > 1:
        raise ValueError(f"`dataset` must give inputs of one shape, got {sorted(shapes)[:3]}; resize them")
    return torch.stack(inputs)


def _by_class(labels: Iterable[Any], classes: Sequence[Any] | None) -> dict[Any, list[int]]:
    members: dict[Any, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    if classes is None:
        # Not in order of appearance, so that a shuffled dataset has the same tasks.
        return dict(sorted(members.items(), key=lambda item: (str(type(item[0])), item[0])))
    if isinstance(classes, str | bytes) or not isinstance(classes, Sequence):
        raise TypeError(f"`classes` must be a sequence of labels, got {type(classes).__name__}")
    if unknown := [label for label in classes if label not in members]:
        raise ValueError(f"`classes` must be labels of `dataset`, it has no sample of {unknown[:5]}")
    return {label: members[label] for label in classes}
