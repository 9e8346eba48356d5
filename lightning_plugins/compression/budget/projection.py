"""The last step before a network is made smaller: remove the least useful until it is within its budget."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_plugins._checks import check_instance, check_int, check_positive_int
from lightning_plugins._deprecation import renamed
from lightning_plugins.compression.budget.budget import Budget, Projection
from lightning_plugins.compression.channels.group import ChannelGroup
from lightning_plugins.compression.channels.shrink import check_kept
from lightning_plugins.compression.networks.arguments import check_tensors


@renamed(minimum="min_channels", multiple="multiple_of")
def project(
    budget: Budget,
    kept: Sequence[Tensor] = (),
    scores: Sequence[Tensor] = (),
    ranks: Mapping[str, int] | None = None,
    margins: Mapping[str, Tensor] | None = None,
    *,
    min_channels: int = 1,
    multiple_of: int = 1,
) -> Projection:
    """Remove the least useful units and singular values until the exact cost is within the budget.

    First every number of units and every rank is rounded up to a multiple. Then, one block of that size after the
    other, the units with the lowest scores or the smallest singular values are removed, whichever are lower, until the
    cost is at most ``budget.limit``.

    Args:
        budget: The budget.
        kept: Which units stay so far: a boolean tensor for each group.
        scores: How useful the units are: a tensor of the same shape for each.
        ranks: The ranks so far, for the layers with ranks.
        margins: How useful the singular values are, on the scale of ``scores`` and in falling order: for masks and
            thresholds of one temperature the scores and ``(s - tau) / s_1``.
        min_channels: The least number of units of a group, and the least rank of a layer. Every block may be removed.
        multiple_of: Numbers of units and ranks are multiples of this, or as large as they can be. The heads of an
            attention are not rounded.

    Returns:
        What stays, and its cost.

    Raises:
        ValueError: If the arguments do not fit each other, or the smallest network is above the budget.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> from torch import nn
        >>> from lightning_plugins.compression import channel_groups
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> budget = Budget(net, channel_groups(net, torch.zeros(1, 4)), target=0.5)
        >>> project(budget, [torch.ones(8).bool()], [torch.arange(8.0)])
        Projection(kept=[tensor([False, False, False, False, False,  True,  True,  True])], ranks={}, cost=23)
    """
    check_positive_int("min_channels", min_channels)
    check_positive_int("multiple_of", multiple_of)
    check_instance("budget", budget, Budget, "a Budget")
    check_tensors("kept", kept)
    check_tensors("scores", scores)
    for name, given in (("ranks", ranks), ("margins", margins)):
        check_instance(name, {} if given is None else given, Mapping, "a mapping by names of layers")
    for name, rank in (ranks or {}).items():
        check_int(f"ranks[{name!r}]", rank)
    check_kept_shapes(budget, kept, scores)
    ranks, margins = dict(ranks or {}), dict(margins or {})
    for name in budget.ranks:
        if name in ranks and name not in margins:
            raise ValueError(f"`margins` must have an entry for every layer of `ranks`, got none for {name!r}")
    state = _State(budget, kept, scores, ranks, margins, min_channels, multiple_of)
    while state.cost() > budget.limit:
        if not state.remove():
            raise ValueError(
                f"`budget.target` must be at least {state.cost() / budget.dense:.4g} for this network: "
                f"that is left when all groups and ranks are at their minimum{_blocks_too(budget)}, got {budget.target}"
            )
    return Projection(state.masks(), state.split(), state.cost())


def check_kept_shapes(budget: Budget, kept: Sequence[Tensor], scores: Sequence[Tensor]) -> None:
    """Raise an error for masks and scores that do not match the budget's groups.

    Args:
        budget: The budget.
        kept: The masks.
        scores: The scores.

    Raises:
        ValueError: If they do not.
    """
    check_kept(budget.groups, [keep | True for keep in kept])
    shapes = [tuple(score.shape) for score in scores]
    if shapes != [(group.size,) for group in budget.groups]:
        raise ValueError(f"`scores` must have one tensor of the shape of each of `kept`, got shapes {shapes}")


class _State:
    """Numbers of remaining units and singular values, and the next to remove."""

    def __init__(
        self,
        budget: Budget,
        kept: Sequence[Tensor],
        scores: Sequence[Tensor],
        ranks: dict[str, int],
        margins: dict[str, Tensor],
        minimum: int,
        multiple: int,
    ) -> None:
        self.budget, self.minimum, self.multiple, self.margins = budget, minimum, multiple, margins
        # Units removed anyway come last in the order, so that rounding up restores the best of them.
        self.orders, self.values, self.counts = [], [], []
        for group, keep, score in zip(budget.groups, kept, scores, strict=True):
            score = score.detach().double().cpu()
            order = torch.argsort(score + 2 * keep.cpu() * score.abs().amax().add(1), descending=True, stable=True)
            least, step = self._least(group)
            self.orders.append(order)
            self.values.append(score[order].tolist())
            self.counts.append(min(group.size, _up(max(int(keep.sum()), least), step)))
        self.ranks = {name: _up(max(int(rank), minimum), multiple) for name, rank in ranks.items()}

    def masks(self) -> list[Tensor]:
        masks = []
        for order, count in zip(self.orders, self.counts, strict=True):
            mask = torch.zeros(len(order), dtype=torch.bool)
            mask[order[:count]] = True
            masks.append(mask)
        return masks

    def cost(self) -> int:
        return self.budget.cost(self.masks() if self.budget.groups else None, self.ranks)

    def split(self) -> dict[str, int]:
        """The ranks below which a layer is smaller when factorised."""
        sides = self.budget.sides(self.masks() if self.budget.groups else None)
        return {
            name: rank for name, rank in self.ranks.items() if rank * sum(sides[name]) < sides[name][0] * sides[name][1]
        }

    def remove(self) -> bool:
        """Remove the least useful block; False if everything is at its minimum."""
        best: tuple[float, int, str, int] | None = None
        for index, (group, count) in enumerate(zip(self.budget.groups, self.counts, strict=True)):
            least, step = self._least(group)
            lower = (count - 1) // step * step
            if lower >= least:
                candidate = (self.values[index][lower], index, "", lower)
                best = candidate if best is None or candidate[:2] < best[:2] else best
        sides = self.budget.sides(self.masks() if self.budget.groups else None)
        for place, (name, rank) in enumerate(self.ranks.items()):
            rows, columns = sides[name]
            largest = (rows * columns - 1) // (rows + columns)  # the largest rank at which the factors are smaller
            lower = (min(rank, largest + 1) - 1) // self.multiple * self.multiple
            if lower >= max(1, self.minimum):
                candidate = (self._margin(name, lower), len(self.counts) + place, name, lower)
                best = candidate if best is None or candidate[:2] < best[:2] else best
        if best is None:
            return False
        _, index, name, lower = best
        if name:
            self.ranks[name] = lower
        else:
            self.counts[index] = lower
        return True

    def _least(self, group: ChannelGroup) -> tuple[int, int]:
        """The least number of units of a group, and the number of which it is a multiple."""
        if group.block:
            return 0, 1
        return max(1, self.minimum), 1 if group.attention else self.multiple

    def _margin(self, name: str, place: int) -> float:
        margins = self.margins[name]
        return float(margins[place]) if place < len(margins) else -torch.inf


def _blocks_too(budget: Budget) -> str:
    return " and all blocks are removed" if any(group.block for group in budget.groups) else ""


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
