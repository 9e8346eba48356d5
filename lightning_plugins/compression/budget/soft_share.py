"""The share of a network's cost that soft masks and ranks leave, with a gradient that lets every threshold rise."""

import torch
from torch import Tensor

from lightning_plugins.compression.budget.budget import Budget
from lightning_plugins.compression.gates.masks import ChannelMasks
from lightning_plugins.compression.gates.rank_thresholds import RankThresholds


def soft_share(
    budget: Budget, masks: ChannelMasks | None, thresholds: RankThresholds | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The share of the cost that masks and soft ranks leave, with gradients to both, and these ranks.

    The value is that of the budget. A rank has a gradient also where it is so high that the dense layer is cheaper: no
    threshold would ever begin to rise otherwise.

    Args:
        budget: The budget.
        masks: Masks on channels, if there are any.
        thresholds: Thresholds on singular values, if there are any.

    Returns:
        The share, a scalar, and the soft ranks by layer, without gradients.
    """
    kept = None if masks is None else masks.values()
    if thresholds is None:
        return budget.share(kept), {}
    ranks = thresholds.soft_ranks()
    share = budget.share(kept, {name: rank.detach() for name, rank in ranks.items()})
    with torch.enable_grad():
        # At rank zero every layer is factorised, and its cost grows with the rank as that of factors does.
        none = {name: torch.zeros_like(rank, requires_grad=True) for name, rank in ranks.items()}
        fixed = None if kept is None else [mask.detach() for mask in kept]
        slopes = torch.autograd.grad(budget.share(fixed, none), list(none.values()))
    for slope, rank in zip(slopes, ranks.values(), strict=True):
        share = share + (slope * (rank - rank.detach())).double()
    return share, {name: rank.detach() for name, rank in ranks.items()}
