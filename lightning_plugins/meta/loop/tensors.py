"""What an inner loop is called with, checked and made fit for derivatives."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


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


def check_batches(support: object, query: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Refuse support and query batches that are not of the same tasks."""
    tensors = (*check_batch("support", support), *check_batch("query", query))
    if len(tensors[0]) != len(tensors[2]):
        raise ValueError(f"`query` must have as many tasks as `support`, {len(tensors[0])}, got {len(tensors[2])}")
    return tensors


@contextmanager
def ordinary_tensors(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Leave the modes in which nothing can be differentiated, or not rightly."""
    # Nothing scales the inner loss, so small entries of a float16 gradient would become zero. The range of bfloat16 is
    # that of float32, so its autocast stays. What was made in inference mode is copied.
    inference, device = torch.is_inference_mode_enabled(), tensors[0].device.type
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    with ExitStack() as contexts:
        if inference:
            contexts.enter_context(torch.inference_mode(False))
            contexts.enter_context(torch.no_grad())
        if half:
            contexts.enter_context(torch.autocast(device, enabled=False))
            tensors = [tensor.float() if tensor.dtype == torch.float16 else tensor for tensor in tensors]
        yield tuple(tensor.clone() if tensor.is_inference() else tensor for tensor in tensors)
