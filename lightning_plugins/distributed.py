"""Differentiable sums over ranks, rows of all ranks, and distribution of work over ranks.

Everything here also works without a process group or with a single process, and then exchanges nothing. All ranks must
call the collective functions in the same order.
"""

import heapq
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_plugins._checks import check_finite_number, check_non_negative_int, check_positive_int


class RankError(RuntimeError):
    """Ranks are inconsistent, or one did not join an exchange.

    Args:
        message: Names the rank.
        place: A number the rank reported, such as the index of its current layer; None if it reported none.
    """

    def __init__(self, message: str, place: int | None = None) -> None:
        super().__init__(message)
        self.place = place


_cpu_groups: dict[Any, Any] = {}  # at most one entry: the default group, and a group with the same ranks for the CPU


def is_distributed() -> bool:
    """Tell whether this process belongs to a process group of two ranks or more.

    Returns:
        Whether there is another rank to exchange with.

    Example:
        >>> is_distributed()
        False
    """
    return world_size() > 1


def world_size() -> int:
    """Count the ranks of the default process group.

    Returns:
        The number of ranks, 1 without a process group.

    Example:
        >>> world_size()
        1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum a tensor over the ranks; the backward pass sums the incoming gradients over the ranks too.

    Every rank receives, for its own ``x``, the derivative of the sum of what all ranks made of the total. That is what
    one process would compute with all terms in one loss, and it holds for second and higher derivatives as well.

    Args:
        x: A tensor of the same shape and dtype on every rank.

    Returns:
        The total, of the shape of ``x``; ``x`` itself if there is one rank.

    Example:
        >>> sum_over_ranks(torch.ones(2))
        tensor([1., 1.])
    """
    return _SumOverRanks.apply(x) if is_distributed() else x


def share_gradient(x: Tensor) -> Tensor:
    """Return a value that is equal on all ranks, and sum its incoming gradients over the ranks.

    For a value that depends on rows of all ranks, where each rank has only its own rows in the autograd graph: each
    rank's rows then get the derivative of the sum of all ranks' losses, as with `sum_over_ranks`, but only the gradient
    of ``x`` is exchanged rather than that of the exchanged tensors.

    A second derivative would need the detached rows of the other ranks, so ``create_graph=True`` raises an error.

    Args:
        x: A tensor, usually a scalar, that is equal on all ranks.

    Returns:
        ``x``, with this backward pass; ``x`` itself if there is one rank. The backward raises `RuntimeError` under
        ``create_graph=True``.

    Example:
        >>> share_gradient(torch.tensor(2.0))
        tensor(2.)
    """
    return _ShareGradient.apply(x) if is_distributed() else x


def gather_row_counts(n: int) -> list[int]:
    """Exchange the number of rows of each rank without synchronising the accelerator.

    The counts are exchanged over a CPU group. If the default group has no CPU backend (NCCL alone), the first call
    creates a gloo group of the same ranks, once per process group.

    Args:
        n: The number of rows of this rank, at least 0.

    Returns:
        The number of rows of every rank, in the order of the ranks.

    Raises:
        TypeError: If ``n`` is not an int.
        ValueError: If ``n`` is negative.

    Example:
        >>> gather_row_counts(8)
        [8]
    """
    check_non_negative_int("n", n)
    return [count for (count,) in gather_integers([n])]


def gather_integers(values: Sequence[int], *, patience: float | None = None) -> list[list[int]]:
    """Exchange a few integers of every rank without synchronising the accelerator.

    Args:
        values: The same number on every rank.
        patience: Seconds after which to give up, if less than the timeout of the process group.

    Returns:
        The integers of every rank, in the order of the ranks; over the group that `gather_row_counts` describes.

    Raises:
        RankError: If a rank did not join within the timeout of the process group, or has exited.

    Example:
        >>> gather_integers([3, 5])
        [[3, 5]]
    """
    if not is_distributed():
        return [list(values)]
    rank, ranks = dist.get_rank(), world_size()
    found = torch.zeros(ranks, len(values), dtype=torch.int64)
    found[rank] = torch.tensor(values)
    try:
        if patience is None:
            dist.all_reduce(found, group=_cpu_group())
        else:
            work: Any = dist.all_reduce(found, group=_cpu_group(), async_op=True)
            work.wait(timedelta(seconds=patience))
    except RuntimeError as error:
        raise RankError(
            f"rank {rank} waited in vain for another of {ranks} ranks, which has ended, stopped training early or is"
            f" at another exchange ({str(error).splitlines()[0]})"
        ) from error
    return [[int(value) for value in row] for row in found.tolist()]


def gather_rows(x: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Exchange blocks of rows of different sizes, without padding.

    Args:
        x: The rows of this rank, shape ``(counts[rank], ...)``; the further dimensions and the dtype are the same on
            all ranks.
        counts: The number of rows of every rank, as `gather_row_counts` returns them.

    Returns:
        One block per rank, in the order of the ranks. This rank's block is ``x`` itself, with its graph; the others are
        detached: no gradient is sent back to their rank.

    Raises:
        ValueError: If
            ``counts`` does not have one entry per rank, or its entry for this rank differs from the rows of ``x``.

    Example:
        >>> gather_rows(torch.ones(2, 1), [2])
        [tensor([[1.],
                [1.]])]
    """
    rank = dist.get_rank() if is_distributed() else 0
    if len(counts) != world_size():
        raise ValueError(f"`counts` must have one entry for each of {world_size()} ranks, got {list(counts)}")
    if x.ndim == 0 or len(x) != counts[rank]:
        raise ValueError(
            f"`x` must have counts[{rank}] = {counts[rank]} rows on rank {rank}, got shape {tuple(x.shape)}"
        )
    own = x.detach().contiguous()
    blocks = [own.new_empty((n, *x.shape[1:])) for n in counts]
    if len(blocks) > 1 and len(set(counts)) == 1:
        dist.all_gather(blocks, own)
    elif len(blocks) > 1:  # gloo refuses to gather unequal blocks
        # A copy: gloo bumps the version even of a tensor it sends from a GPU, and the rows are saved for backward.
        blocks[rank] = own.clone()
        sends = [dist.broadcast(block, source, async_op=True) for source, block in enumerate(blocks) if len(block)]
        for send in filter(None, sends):
            send.wait()
    return [*blocks[:rank], x, *blocks[rank + 1 :]]


def share_out(costs: Sequence[float], world_size: int) -> list[int]:
    """Distribute items over ranks so that the ranks' total costs are about equal.

    Items are assigned in order of decreasing cost to the rank with the smallest total, which is within 4/3 of the
    optimum. All ranks get the same result from the same costs.

    Args:
        costs: The cost of each item, in any unit, at least 0.
        world_size: The number of ranks.

    Returns:
        The rank of each item.

    Raises:
        TypeError: If ``world_size`` is not an int or a cost not a number.
        ValueError: If ``world_size`` is less than 1, or a cost is negative or not finite.

    Example:
        >>> share_out([1, 5, 2, 3], 2)
        [0, 0, 1, 1]
    """
    check_positive_int("world_size", world_size)
    for index, cost in enumerate(costs):
        if check_finite_number(f"costs[{index}]", cost) < 0:
            raise ValueError(f"`costs[{index}]` must be at least 0, got {cost!r}")
    owners = [0] * len(costs)
    loads = [(0.0, rank) for rank in range(world_size)]  # ties go to the lowest rank
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):  # stable: ties keep the items' order
        load, rank = loads[0]
        owners[index] = rank
        heapq.heapreplace(loads, (load + costs[index], rank))
    return owners


def full_tensor(x: Tensor) -> Tensor:
    """Assemble a tensor that is sharded over ranks.

    Args:
        x: A tensor; for a ``DTensor`` all ranks of its mesh must call.

    Returns:
        The full tensor of a ``DTensor``, any other tensor unchanged. The backward pass gives each shard its part of the
        gradient, which must be equal on all ranks, as for a loss that all ranks compute identically.

    Example:
        >>> full_tensor(torch.ones(2))
        tensor([1., 1.])
    """
    if not dist.is_available():
        return x
    from torch.distributed.tensor import DTensor  # imported late: it takes a good part of a second

    return x.full_tensor() if isinstance(x, DTensor) else x


class _SumOverRanks(torch.autograd.Function):
    """All-reduce with an all-reduce as backward pass: ``dist.all_reduce`` alone has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)  # gradients may come expanded
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_ranks(gradients[0])


class _ShareGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # that is, create_graph=True
            raise RuntimeError(
                "no second derivative through a value shared by several ranks: the other ranks' rows are detached, so "
                "it would lack their part; use `scope='local'` where gradients are differentiated"
            )
        return sum_over_ranks(gradients[0])


def _cpu_group() -> Any:
    """A group of all ranks for CPU tensors: the default group if it supports them, else one that is created once."""
    if "cpu:" in dist.get_backend_config():
        return None
    world = dist.group.WORLD
    if world not in _cpu_groups:
        _cpu_groups.clear()  # of a destroyed process group
        _cpu_groups[world] = dist.new_group(backend="gloo")
    return _cpu_groups[world]
