"""Gradients of terms of weights: computed once among the ranks, exchanged, and added to those of autograd."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_plugins._lightning import Trainer
from lightning_plugins.distributed import full_tensor, is_distributed, share_out, world_size
from lightning_plugins.functional.products import add_outer_
from lightning_plugins.functional.stable_rank import whole_gradient
from lightning_plugins.weights import WeightMatrix


def shared_out(
    weights: Sequence[WeightMatrix],
    compute: Callable[[int, Tensor], tuple[Tensor, ...]],
    empty: Callable[[int, Tensor], tuple[Tensor, ...]],
) -> list[tuple[Tensor, ...]]:
    """Compute something for each of several weights, each on one process, and send all results to all processes.

    Args:
        weights: The weights; sharded ones are temporarily assembled.
        compute: From the index of a weight and its matrix to the results.
        empty: From the index of a weight and its matrix to empty tensors of the shapes and dtypes of the results.

    Returns:
        The results for each weight, bit for bit the same on all processes.
    """
    owners = owners_of(weights)
    rank = dist.get_rank() if is_distributed() else 0
    found = []
    for index, (weight, owner) in enumerate(zip(weights, owners, strict=True)):
        matrix = weight.take(full_tensor(weight.tensor.detach()))
        found.append(compute(index, matrix) if owner == rank else empty(index, matrix))
    return sent_by_owners(found, owners)


def sent_by_owners(found: Sequence[tuple[Tensor, ...]], owners: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """Send results from the processes that computed them to all.

    Args:
        found: The results of each process, and empty tensors of the same shapes and dtypes for those of others.
        owners: For each entry the rank of the process that computed it.

    Returns:
        The results, bit for bit the same on all processes.
    """
    if not is_distributed():
        return list(found)
    found = [tuple(part.contiguous() for part in parts) for parts in found]
    sends = [
        dist.broadcast(part, owner, async_op=True) for parts, owner in zip(found, owners, strict=True) for part in parts
    ]
    for send in filter(None, sends):
        send.wait()
    return found


def owners_of(weights: Sequence[WeightMatrix]) -> list[int]:
    """Share out weights over the processes by the cost of their Gram matrices; tells the rank of each."""
    costs = [math.prod(weight.shape) * min(weight.shape[-2:]) for weight in weights]
    return share_out(costs, world_size())


def add_gradient(weight: WeightMatrix, parts: Sequence[Tensor], factor: float, scaler: Any, *, wanted: Tensor) -> None:
    """Add ``factor`` times the gradient of a term to that of a weight; if the weight has none, it stays so.

    Args:
        weight: The weight.
        parts: The gradient with respect to the weight as a matrix, or the ``scale``, ``left`` and ``right`` that
            `FollowedRankTerm` describes; the same on all processes.
        factor: What to multiply it with.
        scaler: The scaler of a fused optimizer, whose gradients are still scaled at this point; else None.
        wanted: Whether to add anything, a bool on the weight's device.
    """
    if weight.is_computed:
        _add_to_sources(weight, parts, factor, scaler, wanted)
        return
    parameter = weight.tensor
    if parameter.grad is None or (wanted.is_cpu and not wanted):
        return
    if not wanted.is_cpu:  # no synchronisation
        parts = [torch.where(wanted, part, 0) for part in parts]
    if len(parts) == 3 and scaler is None and _add_in_place(weight, parts, factor, wanted):
        return
    matrix = parts[0]
    if len(parts) == 3:
        matrix = whole_gradient(_finite(weight.take(full_tensor(parameter.detach())), wanted), *parts)
    part = weight.put(matrix)
    if scaler is not None:
        part = scaler.scale(part)
    if is_sharded(parameter):
        whole = part
        if weight.rows is not None:
            whole = part.new_zeros(parameter.shape)
            whole[slice(*weight.rows)] = part
        parameter.grad.add_(_sharded_like(parameter, whole), alpha=factor)
    elif weight.rows is None:
        parameter.grad.add_(part, alpha=factor)
    else:
        parameter.grad[slice(*weight.rows)].add_(part, alpha=factor)


def _add_to_sources(weight: WeightMatrix, parts: Sequence[Tensor], factor: float, scaler: Any, wanted: Tensor) -> None:
    """Carry the gradient of a weight that is computed on to the parameters that it is computed from."""
    sources = [source for source in weight.sources if source.requires_grad and source.grad is not None]
    if not sources or (wanted.is_cpu and not wanted):
        return
    with torch.enable_grad():
        tensor = weight.tensor
    parts = [torch.where(wanted, part, 0) for part in parts]
    matrix = parts[0]
    if len(parts) == 3:
        matrix = whole_gradient(_finite(weight.take(full_tensor(tensor.detach())), wanted), *parts)
    whole = part = weight.put(matrix).to(tensor.dtype)
    if weight.rows is not None:
        whole = part.new_zeros(tensor.shape)
        whole[slice(*weight.rows)] = part
    whole = whole if scaler is None else scaler.scale(whole)
    whole = _sharded_like(tensor, whole) if is_sharded(tensor) else whole
    for source, gradient in zip(sources, torch.autograd.grad(tensor, sources, whole, allow_unused=True), strict=True):
        if gradient is not None and source.grad is not None:
            source.grad.add_(gradient, alpha=factor)


def scale_rows(parameter: Tensor, rows: tuple[int, int] | None, factors: Tensor) -> None:
    """Multiply rows of a parameter in place.

    Args:
        parameter: The parameter, of shape ``(O, ...)``; one that is sharded over the processes stays so.
        rows: The rows that are meant, from and up to; None for all.
        factors: A scalar, or one number for each of these rows; the same on all processes.
    """
    first, last = (0, len(parameter)) if rows is None else rows
    factors = factors.to(parameter.dtype).expand(last - first).view(-1, *[1] * (parameter.ndim - 1))
    if not is_sharded(parameter):
        parameter.data[first:last].mul_(factors)
        return
    whole = torch.ones(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    whole[first:last] *= factors
    own, wanted = (_local(tensor) for tensor in (parameter.data, _sharded_like(parameter, whole)))
    own.mul_(wanted)


def _add_in_place(weight: WeightMatrix, parts: Sequence[Tensor], factor: float, wanted: Tensor) -> bool:
    """Add the parts without a tensor of the weight's size between; tells whether the memory layout allows it."""
    parameter, (scale, left, right) = weight.tensor, parts
    grad = parameter.grad
    if grad is None or is_sharded(parameter) or {grad.dtype, parameter.dtype} != {scale.dtype}:
        return False
    target = weight.take(grad)
    if target.untyped_storage().data_ptr() != grad.untyped_storage().data_ptr():
        return False
    target.addcmul_(_finite(weight.take(parameter.detach()), wanted), scale, value=factor)
    add_outer_(target, left, right, alpha=factor)
    return True


def _finite(matrix: Tensor, wanted: Tensor) -> Tensor:
    """A weight that a zero may be multiplied with."""
    return matrix if wanted.is_cpu else torch.where(wanted, matrix, 0)


def scaler_of_fused(trainer: Trainer, optimizer: torch.optim.Optimizer) -> Any:
    """The fp16 scaler if the optimizer unscales by itself, as fused ones do: Lightning then leaves it to them.

    Returns:
        The scaler, or None where the gradients are unscaled by now.
    """
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    return getattr(trainer.precision_plugin, "scaler", None) if fused else None


def is_sharded(parameter: Tensor) -> bool:
    """Tell whether each process holds a part of a tensor."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor  # late: it costs a good part of a second

    return isinstance(parameter, DTensor)


def _local(sharded: Any) -> Tensor:
    """The part of a ``DTensor`` on this process, which shares its memory."""
    part: Tensor = sharded.to_local()
    return part


def _sharded_like(parameter: Any, whole: Tensor) -> Tensor:
    """Shard a tensor that all processes hold like a parameter, without communication."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    sharded: Tensor = replicated.redistribute(placements=parameter.placements)
    return sharded
