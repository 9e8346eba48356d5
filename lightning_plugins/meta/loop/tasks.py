"""A function of one task for all tasks: vectorised, one after the other, or chunk by chunk."""

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
# `torch.compiler.disable` does the same, but takes seconds when this module is imported.
eagerly = _disable_dynamo


def over_tasks(
    task: Task, batch: TaskBatch, vectorize: bool, chunk_size: int | None, same_draws: bool
) -> tuple[Any, ...]:
    """Call ``task`` for every task, on tensors whose first dimension counts them, and stack what it returns."""
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
    """Take the gradient of each chunk before the next one, so that one graph is in memory at a time."""
    sources = Sources()

    # `measure` gives a value per task first: the mean gets its gradient. The rest is put together.
    def measured(piece: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """In a function, at whose end nothing holds the graph any more."""
        if draws is not None:
            draws.restore()
        values, *rest = measure(batch.with_tensors([sources.inputs(piece)]))
        value = values.sum() / batch.tasks
        sources.add(value)
        return value.detach()[None], *(tensor.detach() for tensor in rest)

    values, *rest = joined([measured(piece) for piece in chunks(batch, size)])
    return with_known_gradient(values.sum(), sources), *rest


def chunks(batch: TaskBatch, size: int | None) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of up to ``size`` tasks of one size."""
    for group in batch.groups:
        yield from zip(*(tensor.split(size or len(tensor)) for tensor in group), strict=True)


class Draws:
    """The state of the random generators, to return to."""

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.type == "cuda" else None
        self.cpu = torch.get_rng_state()
        self.cuda = None if self.device is None else torch.cuda.get_rng_state(self.device)

    def restore(self) -> None:
        """Set the generators back to the state they were in."""
        torch.set_rng_state(self.cpu)
        if self.device is not None and self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def cat_tasks(value: Tensor | Sequence[Tensor]) -> Tensor:
    """All tasks' samples in one dimension."""
    return value.flatten(0, 1) if isinstance(value, Tensor) else torch.cat(list(value))
