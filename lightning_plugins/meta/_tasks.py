"""A function of one task for all tasks: vectorised, one after the other, or chunk by chunk."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.func import vmap

from lightning_plugins.functional.spectrum import full_precision

Task = Callable[..., tuple[Tensor, ...]]


def check_batch(name: str, batch: object) -> tuple[Tensor, Tensor]:
    """Refuse what is not a pair of inputs and targets with a task and a sample dimension."""
    rule = f"`{name}` must be a pair (inputs, targets) of tensors with shapes (tasks, samples, ...)"
    if not isinstance(batch, Sequence) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        shown = f"{len(batch)} things" if isinstance(batch, Sequence) and len(batch) != 2 else type(batch).__name__
        raise TypeError(f"{rule}, got {shown}")
    inputs, targets = batch
    shapes = f"got {tuple(inputs.shape)} and {tuple(targets.shape)}"
    # Floating inputs of two dimensions would be one task's samples, each of which a linear layer takes for a task.
    least = 3 if inputs.is_floating_point() else 2
    if inputs.ndim < least or targets.ndim < 2:
        raise ValueError(f"{rule}, {shapes}; a single task is `inputs.unsqueeze(0), targets.unsqueeze(0)`")
    if inputs.shape[:2] != targets.shape[:2]:
        raise ValueError(f"{rule}, equal in these two dimensions, {shapes}")
    if 0 in inputs.shape[:2]:
        raise ValueError(f"{rule} with at least one of each, {shapes}")
    return inputs, targets


def over_tasks(
    task: Task, tensors: Sequence[Tensor], *, vectorize: bool, chunk_size: int | None, same_draws: bool
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


@contextmanager
def ordinary_tensors(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Leave inference mode, under which nothing can be differentiated; what was made under it is copied."""
    inference = torch.is_inference_mode_enabled()
    with torch.inference_mode(False) if inference else nullcontext(), torch.no_grad() if inference else nullcontext():
        yield tuple(tensor.clone() if tensor.is_inference() else tensor for tensor in tensors)


class Draws:
    """The state of the random generators, to return to."""

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.type == "cuda" else None
        self.cpu = torch.get_rng_state()
        self.cuda = None if self.device is None else torch.cuda.get_rng_state(self.device)

    def restore(self) -> None:
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
