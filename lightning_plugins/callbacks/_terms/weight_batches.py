"""Terms of weights of few shapes, computed in batches: an accelerator spends most of the time on starting kernels."""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_plugins.callbacks._terms.weight_gradients import add_gradient, is_sharded, owners_of, sent_by_owners
from lightning_plugins.distributed import full_tensor, is_distributed
from lightning_plugins.functional.spectrum import at_least_float32
from lightning_plugins.weights import WeightMatrix

_ROUND = 2**26  # numbers that are copied at a time: 256 MiB in float32


class WeightBatch(NamedTuple):
    """Weights of one shape that one process computes something for.

    Attributes:
        weights: The weights.
        kind: The same for all of them.
        owner: The rank of the process.
        channels_last: Whether the columns are in the order of a ``channels_last`` kernel's memory, for which there is
            nothing to copy: neither singular values nor left singular vectors depend on the order.
        matrices: Their matrices, shape ``(b * groups, m, n)``, at least float32; with one weight it may be its memory.
    """

    weights: list[WeightMatrix]
    kind: Any
    owner: int
    channels_last: bool
    matrices: Tensor

    def each(self, parts: Tensor) -> list[Tensor]:
        """Split ``(b * groups, ...)`` into a part for each weight, without the dimension of a single group."""
        groups = self.weights[0].groups
        return list(parts.unbind()) if groups == 1 else list(parts.unflatten(0, (-1, groups)).unbind())


def in_rounds(
    weights: Sequence[WeightMatrix], kind_of: Callable[[WeightMatrix], Hashable]
) -> Iterator[list[WeightBatch]]:
    """Batch weights by shape and kind, few enough at a time for the copies to take little memory.

    Args:
        weights: The weights; sharded ones are temporarily assembled.
        kind_of: From a weight to something to tell batches apart by.

    Yields:
        The batches of a round, the same on all processes.
    """
    owners = owners_of(weights)
    sizes = [weight.tensor.numel() for weight in weights]
    begin = 0
    while begin < len(weights):
        end, total = begin + 1, sizes[begin]
        while end < len(weights) and total + sizes[end] <= _ROUND:
            total += sizes[end]
            end += 1
        yield _batches(weights[begin:end], owners[begin:end], kind_of)
        begin = end


def computed_in_batches(
    batches: Sequence[WeightBatch],
    compute: Callable[[list[WeightBatch]], Sequence[tuple[Tensor, ...]]],
    empty: Callable[[WeightBatch], tuple[Tensor, ...]],
) -> list[tuple[Tensor, ...]]:
    """Compute something for each batch, each on one process, and send all results to all processes.

    Args:
        batches: The batches.
        compute: From batches to their results.
        empty: From a batch to empty tensors of the shapes and dtypes of its results.

    Returns:
        The results for each batch, bit for bit the same on all processes.
    """
    rank = dist.get_rank() if is_distributed() else 0
    own = [batch for batch in batches if batch.owner == rank]
    results = iter(compute(own) if own else [])
    found = [next(results) if batch.owner == rank else empty(batch) for batch in batches]
    return sent_by_owners(found, [batch.owner for batch in batches])


def of_each_weight(batches: Sequence[WeightBatch], of_matrices: Tensor) -> Tensor:
    """Sum numbers of all matrices of all batches over the groups of each weight."""
    sizes = [len(batch.matrices) for batch in batches]
    if sum(sizes) == sum(len(batch.weights) for batch in batches):
        return of_matrices
    parts = zip(batches, of_matrices.split(sizes), strict=True)
    return torch.cat([part.unflatten(0, (len(batch.weights), -1)).sum(-1) for batch, part in parts])


def add_gradients(
    batches: Sequence[WeightBatch], gradients: Sequence[Tensor], factor: float, scaler: Any, *, wanted: Tensor
) -> None:
    """Add ``factor`` times gradients of terms to those of the weights; a weight that has none stays so.

    Args:
        batches: The batches.
        gradients: For each the gradient with respect to its matrices, which is overwritten.
        factor: What to multiply the gradients with.
        scaler: As for `add_gradient`.
        wanted: Whether to add anything, for each weight of all batches.
    """
    targets, parts = [], []
    counts = [len(batch.weights) for batch in batches]
    unwanted = (~wanted).split(counts)
    for batch, gradient, add, leave in zip(batches, gradients, wanted.split(counts), unwanted, strict=True):
        groups = batch.weights[0].groups
        leave = leave if groups == 1 else leave[:, None].expand(-1, groups).reshape(-1)
        gradient.masked_fill_(leave[:, None, None], 0)
        for index, (weight, part) in enumerate(zip(batch.weights, batch.each(gradient), strict=True)):
            target = None if scaler is not None else _memory_of_gradient(weight, batch.channels_last)
            if target is None or target.dtype != part.dtype or target.stride() != part.stride():
                part = _natural(weight, part) if batch.channels_last else part
                add_gradient(weight, [part], factor, scaler, wanted=add[index])
            else:
                targets.append(target)
                parts.append(part)
    if targets:
        torch._foreach_add_(targets, parts, alpha=factor)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Stack contiguous tensors of one shape, without a copy if they lie one behind another, as after `each`."""
    first = parts[0]
    size, begin, memory = first.numel(), first.storage_offset(), first.untyped_storage().data_ptr()
    for index, part in enumerate(parts):
        if part.untyped_storage().data_ptr() != memory or part.storage_offset() != begin + index * size:
            return torch.stack(list(parts))
    return first.as_strided((len(parts), *first.shape), (size, *first.stride()))


def _batches(
    weights: Sequence[WeightMatrix], owners: Sequence[int], kind_of: Callable[[WeightMatrix], Hashable]
) -> list[WeightBatch]:
    alike: dict[Any, list[tuple[WeightMatrix, Tensor]]] = {}
    for weight, owner in zip(weights, owners, strict=True):
        last, tensor = _is_channels_last(weight), full_tensor(weight.tensor.detach())
        matrix = weight.take(tensor.movedim(1, -1) if last else tensor)
        key = (kind_of(weight), owner, last, tuple(matrix.shape), matrix.dtype)
        alike.setdefault(key, []).append((weight, matrix))
    batches = []
    for (kind, owner, last, *_), members in alike.items():
        matrices = [matrix if matrix.ndim == 3 else matrix[None] for _, matrix in members]
        stacked = at_least_float32(matrices[0] if len(matrices) == 1 else torch.cat(matrices))
        batches.append(WeightBatch([weight for weight, _ in members], kind, owner, last, stacked))
    return batches


def _is_channels_last(weight: WeightMatrix) -> bool:
    """Return whether the kernel's memory holds the matrix with its columns in another order."""
    if weight.is_computed or weight.scheme == 2:
        return False
    tensor = weight.tensor
    if tensor.ndim != 4 or tensor.is_contiguous() or is_sharded(tensor):
        return False
    # The right singular vectors of a tall matrix do depend on the order.
    wide = len(tensor) // weight.groups <= math.prod(tensor.shape[1:])
    return wide and tensor.is_contiguous(memory_format=torch.channels_last)


def _memory_of_gradient(weight: WeightMatrix, channels_last: bool) -> Tensor | None:
    """The gradient of a plain parameter as a matrix that shares its memory; None where there is none."""
    if weight.is_computed:
        return None
    grad = weight.tensor.grad
    if grad is None or is_sharded(grad):
        return None
    target = weight.take(grad.movedim(1, -1) if channels_last else grad)
    return target if target.untyped_storage().data_ptr() == grad.untyped_storage().data_ptr() else None


def _natural(weight: WeightMatrix, matrix: Tensor) -> Tensor:
    """A matrix whose columns are in the order of a ``channels_last`` kernel's memory, with those of `take`."""
    outputs, inputs, *kernel = weight.tensor.shape
    return weight.take(matrix.reshape(outputs, *kernel, inputs).movedim(-1, 1))
