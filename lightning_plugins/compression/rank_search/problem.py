"""Problem and result of every choice of ranks: costs of layers, the wanted ratio, and the ranks found."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_fraction
from lightning_plugins.compression.costs.layer_costs import Cost, LayerCost, layer_costs
from lightning_plugins.compression.low_rank.splittable import Layer, select_layers
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
        ratio: Removed fraction of the best of ``beam``; of the best that reached ``target`` once ``beam`` is empty.
        target: The wanted removed fraction, at which the search ends.
        score: Score of that best one.
        candidates: Distinct rank vectors that the level looked at.
        scored: Of these, how many had not been scored before, and were.
        abandoned: Of those scored, how many were given up before the last batch, since they could not win any more.
        beam: What the next level starts from, best first; empty at the end.
    """

    number: int
    ratio: float
    target: float
    score: float
    candidates: int
    scored: int
    abandoned: int
    beam: tuple[ScoredRanks, ...]


class RankSearch(NamedTuple):
    """Ranks that remove the wanted fraction, and how they were found.

    Attributes:
        ranks: Rank of every layer that was selected, as `factorize` takes them; the full rank for one that stays dense.
        score: Score of the network truncated to ``ranks``, without fine-tuning; None for selections that do not score.
        ratio: Removed fraction of the cost of the selected layers; at least what was asked for.
        evaluations: How many rank vectors were scored.
        trace: One entry per level of the search, the start included; empty for selections that do not search.
    """

    ranks: dict[str, int]
    score: float | None
    ratio: float
    evaluations: int
    trace: tuple[SearchLevel, ...]


class RankProblem(NamedTuple):
    """Layers with their costs, and the removed fraction to reach.

    Attributes:
        modules: The layers by name; the names' order is that of every rank vector.
        costs: Their costs, in the same order.
        target: Fraction of the sum of the dense costs that must go.
    """

    modules: Mapping[str, Layer]
    costs: tuple[LayerCost, ...]
    target: float

    @property
    def names(self) -> tuple[str, ...]:
        """The layers' names, in the order of every rank vector."""
        return tuple(self.modules)

    @property
    def dense_cost(self) -> int:
        """Cost of all dense layers together."""
        return sum(cost.dense for cost in self.costs)

    def removed(self, ranks: Sequence[int]) -> float:
        """The removed fraction."""
        kept = sum(cost.at(rank) for cost, rank in zip(self.costs, ranks, strict=True))
        return (self.dense_cost - kept) / self.dense_cost

    def meets(self, ranks: Sequence[int]) -> bool:
        """Return whether enough is removed."""
        return self.removed(ranks) >= self.target

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
        return RankSearch(named, score, self.removed(ranks), evaluations, tuple(trace))


def state_problem(
    model: nn.Module,
    ratio: float,
    layers: str | Sequence[str],
    cost: Cost,
    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None,
    scheme: Scheme,
) -> RankProblem:
    """Find the layers and their costs, and check that the ratio can be reached.

    Returns:
        What is to be solved.

    Raises:
        TypeError: If ``model`` is not a module or ``ratio`` not a number.
        ValueError: If ``ratio`` is not inside (0, 1), or is more than rank 1 everywhere removes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    if check_fraction("ratio", ratio) in {0, 1}:
        raise ValueError(f"`ratio` must be more than 0 and less than 1, got {ratio!r}; it is the removed fraction")
    costs = layer_costs(model, layers, cost=cost, inputs=inputs, scheme=scheme)
    problem = RankProblem(
        select_layers(model, list(costs), scheme=scheme, transposed=True), tuple(costs.values()), ratio
    )
    if problem.dense_cost == 0:
        raise ValueError(f"`inputs` must reach a layer of `layers`, but {layers!r} cost no {cost} in a pass of them")
    if not problem.meets([1] * len(costs)):
        most = problem.removed([1] * len(costs))
        raise ValueError(
            f"`ratio` must be at most {most:.6f} for these {len(costs)} layers, which rank 1 in every one of them "
            f"removes of their {cost}, got {ratio!r}"
        )
    return problem


def largest_that_meets(problem: RankProblem, ranks_at: Callable[[float], Ranks], levels: Tensor) -> Ranks:
    """Bisect for the ranks at the largest of ``levels`` where enough is removed.

    Args:
        problem: What must be met.
        ranks_at: Gives the ranks at a level; they do not fall as the level rises.
        levels: 1-D tensor of the levels where a rank may change; all ranks are 1 at the lowest.

    Returns:
        The ranks.
    """
    ordered = torch.unique(levels).tolist()  # sorted
    low, high = 0, len(ordered)  # enough is removed at `low`, too little from `high` on
    while high - low > 1:
        middle = (low + high) // 2
        if problem.meets(ranks_at(ordered[middle])):
            low = middle
        else:
            high = middle
    return ranks_at(ordered[low])
