"""A function of one task for all tasks: vectorised, one after the other, or chunk by chunk."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.func import vmap

from lightning_plugins.functional.spectrum import full_precision

Task = Callable[..., tuple[Tensor, ...]]

# Keeps a function out of `torch.compile`, which cannot trace every nesting of `vmap`, `grad` and custom functions.
# `torch.compiler.disable` does the same, but takes seconds when this module is imported.
eagerly = _disable_dynamo


def over_tasks(
    task: Task, tensors: Sequence[Tensor], vectorize: bool, chunk_size: int | None, same_draws: bool
) -> tuple[Tensor, ...]:
    """Call ``task`` for every task, on tensors whose first dimension counts them, and stack what it returns."""
    draws = Draws(tensors[0].device) if same_draws else None
    pieces = []
    for piece in chunks(tensors, (chunk_size or len(tensors[0])) if vectorize else 1):
        if draws is not None:
            draws.restore()
        if vectorize:
            pieces.append(vmap(task, randomness="same" if same_draws else "different")(*piece))
        else:
            pieces.append(tuple(result.unsqueeze(0) for result in task(*(tensor[0] for tensor in piece))))
    return pieces[0] if len(pieces) == 1 else tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))


def chunk_by_chunk(
    measure: Callable[[Sequence[Tensor]], tuple[Tensor, ...]],
    tensors: Sequence[Tensor],
    size: int,
    sources: Sequence[Tensor],
    draws: "Draws | None",
) -> tuple[Tensor, ...]:
    """Take the gradient of each chunk before the next one, so that one graph is in memory at a time."""
    gradients: list[Tensor | None] = [None] * len(sources)

    # `measure` gives a value per task first: the mean gets its gradient for the sources. The rest is put together.
    def measured(piece: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """In a function, at whose end nothing holds the graph any more."""
        if draws is not None:
            draws.restore()
        values, *rest = measure(piece)
        value = values.sum() / len(tensors[0])
        add_gradients(gradients, value, sources)
        return value.detach()[None], *rest

    pieces = [measured(piece) for piece in chunks(tensors, size)]
    values, *rest = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return with_known_gradient(values.sum(), gradients, sources), *rest


def chunks(tensors: Sequence[Tensor], size: int) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of up to ``size`` tasks."""
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def add_gradients(total: list[Tensor | None], value: Tensor, sources: Sequence[Tensor]) -> None:
    """Add the gradient of ``value`` to ``total``, in place; what it does not depend on stays None."""
    if not value.requires_grad:
        return
    with full_precision(value):
        gradients = torch.autograd.grad(value, sources, allow_unused=True)
    for i, gradient in enumerate(gradients):
        before = total[i]
        if before is None:
            total[i] = gradient
        elif gradient is not None:
            before += gradient


def with_known_gradient(value: Tensor, gradients: Sequence[Tensor | None], sources: Sequence[Tensor]) -> Tensor:
    """Attach gradients that are known already to a scalar."""
    result: Tensor = _KnownGradient.apply(value, tuple(gradients), *sources)
    return result


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


class _KnownGradient(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor | None, ...], *sources: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if known is None else grad.to(known.dtype) * known for known in ctx.saved_tensors)
        return None, None, *scaled
