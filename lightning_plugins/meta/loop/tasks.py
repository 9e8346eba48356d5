"""Applies a function of one task to all tasks: vectorised, one after the other, or in chunks."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.func import vmap

from lightning_plugins.meta.loop.known_gradient import Sources, with_known_gradient
from lightning_plugins.meta.loop.structure import TaskBatch, joined

Task = Callable[..., tuple[Tensor, ...]]

# Keeps a function out of `torch.compile`, which cannot trace every nesting of `vmap`, `grad` and custom functions.
# `torch.compiler.disable` does the same, but takes seconds to import.
eagerly = _disable_dynamo


def over_tasks(
    task: Task, batch: TaskBatch, vectorize: bool, chunk_size: int | None, same_draws: bool
) -> tuple[Any, ...]:
    """Call ``task`` for every task along the first dimension, and stack the results."""
    draws = Draws(batch.first.device) if same_draws else None
    pieces = []
    for piece in chunks(batch, chunk_size if vectorize else 1):
        if draws is not None:
            draws.restore()
        if vectorize:
            pieces.append(vmap(task, randomness="same" if same_draws else "different")(*piece))
        else:
            pieces.append(tuple(result.unsqueeze(0) for result in task(*(tensor[0] for tensor in piece))))
    return joined(pieces)


def chunk_by_chunk(
    measure: Callable[[TaskBatch], tuple[Tensor, ...]], batch: TaskBatch, size: int, draws: "Draws | None"
) -> tuple[Any, ...]:
    """Compute the gradient of each chunk before the next one, so that only one graph is in memory."""
    sources = Sources()

    # `measure` returns a value per task first, whose mean is differentiated. The rest is concatenated.
    def measured(piece: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """A separate function, so that the graph is released on return."""
        if draws is not None:
            draws.restore()
        values, *rest = measure(batch.with_tensors([sources.inputs(piece)]))
        value = values.sum() / batch.tasks
        sources.add(value)
        return value.detach()[None], *(tensor.detach() for tensor in rest)

    values, *rest = joined([measured(piece) for piece in chunks(batch, size)])
    return with_known_gradient(values.sum(), sources), *rest


def chunks(batch: TaskBatch, size: int | None) -> Iterator[tuple[Tensor, ...]]:
    """Chunks of up to ``size`` tasks of equal size."""
    for group in batch.groups:
        yield from zip(*(tensor.split(size or len(tensor)) for tensor in group), strict=True)


class Draws:
    """The state of the random generators, for restoring."""

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.type == "cuda" else None
        self.cpu = torch.get_rng_state()
        self.cuda = None if self.device is None else torch.cuda.get_rng_state(self.device)

    def restore(self) -> None:
        """Restore the state of the generators."""
        torch.set_rng_state(self.cpu)
        if self.device is not None and self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def cat_tasks(value: Tensor | Sequence[Tensor]) -> Tensor:
    """Merge all tasks' samples into one dimension."""
    return value.flatten(0, 1) if isinstance(value, Tensor) else torch.cat(list(value))
