"""Input tensors of an inner loop: checks and preparation for differentiation."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from lightning_plugins.meta.loop.structure import TaskBatch, batch_of, leaves

_KINDS = "a tensor, or a tuple or mapping of tensors, or a list of one of these for every task"


def check_pair(name: str, batch: object) -> tuple[object, object]:
    """Raise an error unless it is a pair of inputs and targets with a task and a sample dimension."""
    rule = f"`{name}` must be a pair (inputs, targets) of tensors with shapes (tasks, samples, ...)"
    if not isinstance(batch, Sequence) or len(batch) != 2:
        shown = f"{len(batch)} things" if isinstance(batch, Sequence) else type(batch).__name__
        raise TypeError(f"{rule}, got {shown}")
    if any(isinstance(part, list) for part in batch):
        _check_lists(name, batch)
    else:
        _check_tensors(rule, batch[0], batch[1])
    return batch[0], batch[1]


def check_batch(support: object) -> TaskBatch:
    """The support samples of tasks."""
    return batch_of(*check_pair("support", support))


def check_batches(support: object, query: object) -> TaskBatch:
    """Raise an error for support and query batches with different numbers of tasks."""
    parts = (*check_pair("support", support), *check_pair("query", query))
    counts = [_tasks(part) for part in parts]
    if counts[0] != counts[2]:
        raise ValueError(f"`query` must have as many tasks as `support`, {counts[0]}, got {counts[2]}")
    return batch_of(*parts)


@contextmanager
def ordinary_tensors(batch: TaskBatch) -> Iterator[TaskBatch]:
    """Leave modes in which differentiation is impossible or inaccurate."""
    # The inner loss is not scaled, so small entries of a float16 gradient would underflow to zero. bfloat16 has the
    # range of float32, so its autocast is kept. Inference tensors are copied.
    inference, device = torch.is_inference_mode_enabled(), batch.first.device.type
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16

    def ordinary(tensor: Tensor) -> Tensor:
        tensor = tensor.float() if half and tensor.dtype == torch.float16 else tensor
        return tensor.clone() if tensor.is_inference() else tensor

    with ExitStack() as contexts:
        if inference:
            contexts.enter_context(torch.inference_mode(False))
            contexts.enter_context(torch.no_grad())
        if half:
            contexts.enter_context(torch.autocast(device, enabled=False))
        yield batch.with_tensors([tuple(map(ordinary, group)) for group in batch.groups])


def _check_tensors(rule: str, inputs: object, targets: object) -> None:
    tensors = [*_leaves(rule, inputs), *_leaves(rule, targets)]
    shapes = f"got {' and '.join(str(tuple(tensor.shape)) for tensor in tensors)}"
    # Two-dimensional floating inputs are likely the samples of one task, each of which would be treated as a task.
    least = 3 if isinstance(inputs, Tensor) and inputs.is_floating_point() else 2
    if tensors[0].ndim < least or any(tensor.ndim < 2 for tensor in tensors):
        raise ValueError(f"{rule}, {shapes}; a single task is `inputs.unsqueeze(0), targets.unsqueeze(0)`")
    if len({tensor.shape[:2] for tensor in tensors}) > 1:
        raise ValueError(f"{rule}, equal in these two dimensions, {shapes}")
    if 0 in tensors[0].shape[:2]:
        raise ValueError(f"{rule} with at least one of each, {shapes}")


def _check_lists(name: str, batch: Sequence[object]) -> None:
    rule = f"`{name}` with a list must have one entry of shape (samples, ...) for every task"
    counts = [_tasks(part) for part in batch]
    if counts[0] != counts[1] or not counts[0]:
        raise ValueError(
            f"{rule}, in inputs and targets, got {counts[0]} and {counts[1]}; several inputs of the model are a tuple"
        )
    for part in batch:
        if not isinstance(part, list):
            _leaves(rule, part)
            continue
        kinds = [[(leaf.ndim, leaf.dtype) for leaf in _leaves(rule, task)] for task in part]
        if any(kind != kinds[0] for kind in kinds):
            raise ValueError(f"{rule}, of the same dimensions and dtypes, got {kinds[0]} and others")
    for number in range(counts[0]):
        sizes = {_samples(part, number) for part in batch}
        if len(sizes) > 1 or 0 in sizes:
            raise ValueError(f"{rule}, as many inputs as targets and at least one, got {sorted(sizes)} for {number}")


def _leaves(rule: str, part: object) -> list[Tensor]:
    try:
        return leaves(part)
    except TypeError as error:
        raise TypeError(f"{rule}, each {_KINDS}, got {error}") from None


def _tasks(part: object) -> int:
    return len(part) if isinstance(part, list) else len(leaves(part)[0])


def _samples(part: object, number: int) -> int:
    leaf = leaves(part[number])[0] if isinstance(part, list) else leaves(part)[0][number]
    if not leaf.ndim:
        raise ValueError(f"entry {number} of a list of tasks must have shape (samples, ...), got a scalar")
    return len(leaf)
