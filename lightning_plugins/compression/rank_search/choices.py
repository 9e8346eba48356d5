"""One choice for each layer, with the smallest sum of errors within a budget: a multiple-choice knapsack."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Choice(NamedTuple):
    """A rank of a layer.

    Attributes:
        rank: The rank.
        cost: What the layer costs at it.
        error: What it loses.
    """

    rank: int
    cost: int
    error: float


def cheapest_choices(options: Sequence[Sequence[Choice]], limit: int) -> list[Choice]:
    """Choose one option for each layer such that the errors' sum is least and the costs' at most ``limit``.

    A price on cost gives a bound from below, and ranks that fit one from above. An option, or a sum over some layers,
    that cannot come below the one above is left out; what remains is tried out by dynamic programming.

    Args:
        options: The options of each layer.
        limit: What all may cost; the cheapest options of all layers cost no more.

    Returns:
        The choices. Of equal errors those that cost least.

    Example:
        >>> layer = [Choice(1, 2, 5.0), Choice(2, 4, 1.0), Choice(3, 5, 0.0)]
        >>> [choice.rank for choice in cheapest_choices([layer, layer], 8)]
        [2, 2]
    """
    layers = [_undominated(one) for one in options]
    hulls = [_hull(one) for one in layers]
    price, fits = _at_price(hulls, limit)
    fits = _filled(layers, fits, limit)
    # The minimum each layer pays at this price; the gap bounds what a choice may pay above it.
    least = [min(choice.error + price * choice.cost for choice in one) for one in layers]
    best = sum(choice.error for choice in fits)
    gap = best + price * limit - sum(least)
    gap += 1e-9 * (best + price * limit)  # rounding must not exclude ties
    kept = [
        [choice for choice in one if choice.error + price * choice.cost - low <= gap]
        for one, low in zip(layers, least, strict=True)
    ]
    found = _tried_out(kept, least, price, gap, limit)
    return min((found, fits), key=lambda one: (sum(c.error for c in one), sum(c.cost for c in one)))


def _undominated(options: Sequence[Choice]) -> list[Choice]:
    """The options by cost, each with a smaller error than all that cost no more."""
    kept: list[Choice] = []
    for choice in sorted(options, key=lambda one: (one.cost, one.error, one.rank)):
        if not kept or choice.error < kept[-1].error:
            kept.append(choice)
    return kept


def _hull(options: Sequence[Choice]) -> list[Choice]:
    """The corners of the lower convex hull of error over cost, cheapest first."""
    hull: list[Choice] = []
    for choice in options:
        while len(hull) > 1 and _rate(hull[-2], hull[-1]) <= _rate(hull[-2], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _rate(one: Choice, other: Choice) -> float:
    """The error that each unit of cost saves between two options."""
    return (one.error - other.error) / (other.cost - one.cost)


def _at_price(hulls: Sequence[Sequence[Choice]], limit: int) -> tuple[float, list[Choice]]:
    """Starting from the cheapest choices, take what saves most error per cost, until something does not fit.

    Returns:
        The price at which that is, 0 if all fits, and the choices.
    """
    now = [0] * len(hulls)
    left = limit - sum(hull[0].cost for hull in hulls)
    steps = sorted(
        (-_rate(one, other), layer, place, other.cost - one.cost)
        for layer, hull in enumerate(hulls)
        for place, (one, other) in enumerate(pairwise(hull))
    )
    price = 0.0
    for rate, layer, _, cost in steps:
        if cost > left:
            price = -rate
            break
        now[layer] += 1
        left -= cost
    return price, [hull[place] for hull, place in zip(hulls, now, strict=True)]


def _filled(layers: Sequence[Sequence[Choice]], fits: Sequence[Choice], limit: int) -> list[Choice]:
    """Spend the rest of the budget greedily on the affordable choice that saves most error per cost."""
    found = list(fits)
    left = limit - sum(choice.cost for choice in found)
    while True:
        steps = [
            (_rate(found[layer], choice), -layer, choice)
            for layer, one in enumerate(layers)
            for choice in one
            if 0 < choice.cost - found[layer].cost <= left
        ]
        if not steps:
            return found
        _, layer, choice = max(steps)
        left -= choice.cost - found[-layer].cost
        found[-layer] = choice


def _tried_out(
    layers: Sequence[Sequence[Choice]], least: Sequence[float], price: float, gap: float, limit: int
) -> list[Choice]:
    """Dynamic programming over the sums that the layers so far can have."""
    costs, errors = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    rest = sum(min(choice.cost for choice in one) for one in layers)
    paid, steps = 0.0, []
    for one, low in zip(layers, least, strict=True):
        rest -= min(choice.cost for choice in one)
        paid += low
        more = torch.tensor([choice.cost for choice in one])
        lost = torch.tensor([choice.error for choice in one], dtype=torch.float64)
        sums, losses = (costs[:, None] + more).flatten(), (errors[:, None] + lost).flatten()
        # What is below no other sum in both, still fits, and pays no more above the least than the gap.
        open_ = (sums + rest <= limit) & (losses + price * sums.double() - paid <= gap)
        places = open_.nonzero()[:, 0]
        places = places[_front(sums[places], losses[places])]
        steps.append((places // len(one), places % len(one)))
        costs, errors = sums[places], losses[places]
    place, chosen = len(costs) - 1, []
    for one, (before, choice) in zip(reversed(layers), reversed(steps), strict=True):
        chosen.append(one[int(choice[place])])
        place = int(before[place])
    return chosen[::-1]


def _front(costs: Tensor, errors: Tensor) -> Tensor:
    """Places of the sums that have a smaller error than all that cost no more, by cost."""
    by_error = errors.argsort(stable=True)
    order = by_error[costs[by_error].argsort(stable=True)]  # by cost, then by error
    lowest = errors[order].cummin(0).values
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = lowest[1:] < lowest[:-1]
    return order[first]
