"""Problem and result of every choice of ranks: costs of layers, the budget, and the ranks found."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_fraction
from lightning_plugins._deprecation import share_left
from lightning_plugins.compression.costs.layer_costs import Cost, LayerCost, layer_costs
from lightning_plugins.compression.low_rank.splittable import Layer, select_layers
from lightning_plugins.compression.networks.arguments import check_module
from lightning_plugins.weights import Scheme

Ranks = tuple[int, ...]  # one per layer, in the order of the problem's names


class ScoredRanks(NamedTuple):
    """A rank for every layer, and the score of the network truncated to them.

    Attributes:
        ranks: The ranks, in the order of the keys of `RankSearch.ranks`.
        score: Mean score over all samples, or over all batches if the score function returns means.
    """

    ranks: Ranks
    score: float


class SearchLevel(NamedTuple):
    """Record of one level of a search.

    Attributes:
        number: 0 for the start, then one more for every level.
        share: Share of the cost that the best of ``beam`` leaves; that the best within ``budget`` leaves once ``beam``
            is empty.
        budget: The share that may be left, at which the search ends.
        score: Score of that best one.
        candidates: Number of distinct rank vectors considered at the level.
        scored: Of these, how many had not been scored before, and were.
        abandoned: Of those scored, how many were given up before the last batch, since they could not win any more.
        beam: What the next level starts from, best first; empty at the end.
    """

    number: int
    share: float
    budget: float
    score: float
    candidates: int
    scored: int
    abandoned: int
    beam: tuple[ScoredRanks, ...]

    @property
    def ratio(self) -> float:
        """The removed fraction, ``1 - share``; an older name, which works up to the next minor version."""
        return removed_for(self.share, "ratio", "share")

    @property
    def target(self) -> float:
        """The wanted removed fraction, ``1 - budget``; an older name, which works up to the next minor version."""
        return removed_for(self.budget, "target", "budget")


class RankSearch(NamedTuple):
    """Ranks within a budget, and how they were found.

    Attributes:
        ranks: Rank of every layer that was selected, as `factorize` takes them; the full rank for one that stays dense.
        score: Score of the network truncated to ``ranks``, without fine-tuning; None for selections that do not score.
        share: Remaining fraction of the cost of the selected layers; at most the budget.
        evaluations: How many rank vectors were scored.
        trace: One entry per level of the search, the start included; empty for selections that do not search.
    """

    ranks: dict[str, int]
    score: float | None
    share: float
    evaluations: int
    trace: tuple[SearchLevel, ...]

    @property
    def ratio(self) -> float:
        """The removed fraction, ``1 - share``; an older name, which works up to the next minor version."""
        return removed_for(self.share, "ratio", "share")


def removed_for(share: float, old: str, new: str) -> float:
    """Return the removed fraction for a share, and warn of the older name that was asked for."""
    text = f"`{old}`, the removed fraction, was renamed: `{new}` is the share that is left, `1 - {old}`"
    warnings.warn(f"{text}. The older name works up to the next minor version", FutureWarning, stacklevel=3)
    return float(share_left(share))


class RankProblem(NamedTuple):
    """Layers with their costs, and the share that may be left.

    Attributes:
        modules: The layers by name; the names' order is that of every rank vector.
        costs: Their costs, in the same order.
        budget: Share of the sum of the dense costs that may be left.
    """

    modules: Mapping[str, Layer]
    costs: tuple[LayerCost, ...]
    budget: float

    @property
    def names(self) -> tuple[str, ...]:
        """The layers' names, in the order of every rank vector."""
        return tuple(self.modules)

    @property
    def dense_cost(self) -> int:
        """Cost of all dense layers together."""
        return sum(cost.dense for cost in self.costs)

    def share(self, ranks: Sequence[int]) -> float:
        """The share of the cost that is left."""
        return sum(cost.at(rank) for cost, rank in zip(self.costs, ranks, strict=True)) / self.dense_cost

    def meets(self, ranks: Sequence[int]) -> bool:
        """Return whether the ranks are within the budget."""
        return self.share(ranks) <= self.budget

    def without_gainless(self, ranks: Sequence[int]) -> Ranks:
        """The ranks, with the full rank wherever factors would not be cheaper than the dense layer."""
        return tuple(
            rank if rank <= cost.break_even else cost.full_rank for cost, rank in zip(self.costs, ranks, strict=True)
        )

    def result(
        self, ranks: Sequence[int], score: float | None = None, evaluations: int = 0, trace: Sequence[SearchLevel] = ()
    ) -> RankSearch:
        """The result that delivers ``ranks``."""
        named = dict(zip(self.names, ranks, strict=True))
        return RankSearch(named, score, self.share(ranks), evaluations, tuple(trace))


def state_problem(
    model: nn.Module,
    budget: float,
    layers: str | Sequence[str],
    cost: Cost,
    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None,
    scheme: Scheme,
) -> RankProblem:
    """Find the layers and their costs, and check that the budget can be met.

    Returns:
        What is to be solved.

    Raises:
        TypeError: If ``model`` is not a module or ``budget`` not a number.
        ValueError: If ``budget`` is not inside (0, 1), or is less than rank 1 everywhere leaves.
    """
    check_module(model)
    if check_fraction("budget", budget) in {0, 1}:
        raise ValueError(f"`budget` must be more than 0 and less than 1, got {budget!r}; it is the share that is left")
    costs = layer_costs(model, layers, cost=cost, inputs=inputs, scheme=scheme)
    problem = RankProblem(
        select_layers(model, list(costs), scheme=scheme, transposed=True), tuple(costs.values()), budget
    )
    if problem.dense_cost == 0:
        raise ValueError(f"`inputs` must reach a layer of `layers`, but {layers!r} cost no {cost} in a pass of them")
    if not problem.meets([1] * len(costs)):
        least = problem.share([1] * len(costs))
        raise ValueError(
            f"`budget` must be at least {least:.6f} for these {len(costs)} layers, which rank 1 in every one of them "
            f"leaves of their {cost}, got {budget!r}"
        )
    return problem


def largest_that_meets(problem: RankProblem, ranks_at: Callable[[float], Ranks], levels: Tensor) -> Ranks:
    """Bisect for the ranks at the largest of ``levels`` that are within the budget.

    Args:
        problem: What must be met.
        ranks_at: Gives the ranks at a level; they do not fall as the level rises.
        levels: 1-D tensor of the levels where a rank may change; all ranks are 1 at the lowest.

    Returns:
        The ranks.
    """
    ordered = torch.unique(levels).tolist()  # sorted
    low, high = 0, len(ordered)  # within the budget at `low`, above it from `high` on
    while high - low > 1:
        middle = (low + high) // 2
        if problem.meets(ranks_at(ordered[middle])):
            low = middle
        else:
            high = middle
    return ranks_at(ordered[low])
