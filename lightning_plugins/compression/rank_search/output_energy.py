"""Ranks that minimise the error of all layers' outputs together, under one budget."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_bool, check_finite_number, nearest
from lightning_plugins._deprecation import Replaced, renamed, share_left
from lightning_plugins.compression.costs.layer_costs import Cost
from lightning_plugins.compression.low_rank.decomposition import InputMoments
from lightning_plugins.compression.rank_search.choices import Choice, cheapest_choices
from lightning_plugins.compression.rank_search.problem import RankProblem, RankSearch, state_problem
from lightning_plugins.compression.rank_search.truncation import energies
from lightning_plugins.weights import Scheme


@renamed(ratio=Replaced("budget", share_left))
def output_energy(
    model: nn.Module,
    calibration: InputMoments | None = None,
    *,
    budget: float,
    layers: str | Sequence[str] = "*",
    cost: Cost = "params",
    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    scheme: Scheme = 1,
    sensitivity: Mapping[str, float] | None = None,
    relative: bool = False,
) -> RankSearch:
    """Minimise the sum of all layers' output errors, exactly, over all ranks within a budget.

    Each layer gives up output energy for each rank that goes; ranks go where a unit of cost gives up least. Rising and
    falling along this exchange rate is `trade_off`; here the rest of the budget, which no common rate fits, is spent
    too, so no other ranks within it have a smaller sum. Of equal sums the one that costs least is taken.

    Args:
        model: As for `equal_ratio`.
        calibration: What the layers receive, such as a `Calibration`; None counts the energy of the weights.
        budget: As for `equal_ratio`.
        layers: As for `equal_ratio`.
        cost: As for `equal_ratio`.
        inputs: As for `equal_ratio`.
        scheme: As for `equal_ratio`.
        sensitivity: A factor for the error of each layer by name, such as `output_sensitivity` measures.
        relative: Whether each layer's error is taken as a fraction of the energy of its outputs.

    Returns:
        As `equal_ratio`.

    Raises:
        ValueError: As `equal_ratio`, or if a weight is not finite, ``calibration`` or ``sensitivity`` know nothing of a
            layer, or a factor is negative.
        TypeError: As `equal_ratio`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
        >>> from lightning_plugins.compression import Calibration
        >>> calibration = Calibration(net).record([torch.randn(64, 30)])
        >>> output_energy(net, calibration, budget=0.5).share <= 0.5
        True

    Source:
        Ours. The exchange rate is that of `trade_off`; what it leaves is a multiple-choice knapsack problem, solved by
        dynamic programming over the choices that bounds do not exclude (Dyer, Kayal and Walker, 1984).
    """
    check_bool("relative", relative)
    problem = state_problem(model, budget, layers, cost, inputs, scheme)
    factors = _factors(problem, sensitivity)
    found = energies(problem.modules, scheme, calibration)
    choices = []
    for one, energy, factor in zip(problem.costs, found, factors, strict=True):
        error = energy.flip(0).cumsum(0).flip(0) * factor  # error[rank]
        if relative:
            error = error / error[0].clamp_min(torch.finfo(error.dtype).tiny)
        options = [Choice(one.full_rank, one.dense, 0.0)]
        options += [Choice(rank, one.at(rank), float(error[rank])) for rank in range(1, one.break_even + 1)]
        choices.append(options)
    chosen = cheapest_choices(choices, _limit(problem))
    return problem.result([choice.rank for choice in chosen])


def _limit(problem: RankProblem) -> int:
    """The most that may be left: the largest number that `RankProblem.meets` accepts, whatever is rounded in it."""
    dense = problem.dense_cost
    limit = math.floor(dense * problem.budget) + 1
    while limit / dense > problem.budget:
        limit -= 1
    return limit


def _factors(problem: RankProblem, sensitivity: Mapping[str, float] | None) -> list[float]:
    if sensitivity is None:
        return [1.0] * len(problem.names)
    if not isinstance(sensitivity, Mapping):
        raise TypeError(f"`sensitivity` must give a number for each layer by name, got {type(sensitivity).__name__}")
    factors = []
    for name in problem.names:
        if name not in sensitivity:
            near = "".join(f"; did you mean {other!r}?" for other in nearest(name, map(str, sensitivity), limit=1))
            raise ValueError(f"`sensitivity` must have a factor for each layer, but has none for {name!r}{near}")
        factors.append(check_finite_number(f"sensitivity[{name!r}]", sensitivity[name]))
        if factors[-1] < 0:
            raise ValueError(f"`sensitivity[{name!r}]` must be at least 0, got {factors[-1]!r}")
    return factors
