"""The levels of a beam search: children, the survivors, and those within the budget."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_plugins.compression.rank_search.problem import RankProblem, Ranks, RankSearch, ScoredRanks, SearchLevel
from lightning_plugins.compression.rank_search.scoring import CandidateScores, Contest
from lightning_plugins.compression.rank_search.search_state import SearchState
from lightning_plugins.distributed import is_distributed, sum_over_ranks


class Beam:
    """The levels of one search.

    Args:
        problem: The layers and the budget.
        steps: How much a step lowers the rank of each layer.
        width: How many rank vectors a level starts from.
        scores: Scores rank vectors.
        discarded: For each layer and rank the fraction of the energy that is lost, which decides between equal scores.
        state: What is known already.
    """

    def __init__(
        self,
        problem: RankProblem,
        steps: Sequence[int],
        width: int,
        scores: CandidateScores,
        discarded: list[list[float]],
        state: SearchState,
    ) -> None:
        self.problem, self.steps, self.width, self.scores = problem, steps, width, scores
        self.discarded, self.state = discarded, state
        self.start = problem.without_gainless([max(one.break_even, 1) for one in problem.costs])
        if self.beam:
            scores.first(self.start)  # checks the batches, and learns their counts

    @property
    def beam(self) -> tuple[ScoredRanks, ...]:
        """The candidates from which the next level starts."""
        return self.state.levels[-1].beam if self.state.levels else ()

    def advance(self) -> SearchLevel:
        """Make the next level."""
        if not self.state.levels:
            return self._add_level({self.start: self.scores.first(self.start)}, candidates=1)
        children = sorted({child for parent in self.beam for child in self._children(parent.ranks)})
        reached = [child for child in children if self.problem.meets(child)]
        contests = [
            Contest([child for child in children if not self.problem.meets(child)], self.width),
            Contest([child for child in reached if child not in self.state.finished], 1, self._best_score()),
        ]
        return self._add_level(self.scores.best(contests), len(children))

    def result(self) -> RankSearch:
        """The best within the budget."""
        best = self._best()
        evaluations = sum(level.scored for level in self.state.levels)
        return self.problem.result(best.ranks, best.score, evaluations, self.state.levels)

    def _add_level(self, scored: dict[Ranks, float | None], candidates: int) -> SearchLevel:
        finished = {ranks: score for ranks, score in scored.items() if self.problem.meets(ranks)}
        self.state.finished |= dict(sorted(finished.items()))
        known = [ScoredRanks(ranks, score) for ranks, score in scored.items() if score is not None]
        beam = sorted((one for one in known if one.ranks not in finished), key=self._order)[: self.width]
        best = beam[0] if beam else self._best()
        level = SearchLevel(
            number=len(self.state.levels),
            share=self.problem.share(best.ranks),
            budget=self.problem.budget,
            score=best.score,
            candidates=candidates,
            scored=len(scored),
            abandoned=sum(score is None for score in scored.values()),
            beam=tuple(beam),
        )
        self.state.levels.append(level)
        return level

    def _children(self, parent: Ranks) -> Iterator[Ranks]:
        for layer, (rank, cost, step) in enumerate(zip(parent, self.problem.costs, self.steps, strict=True)):
            if 1 < rank <= cost.break_even:
                lower = max(rank - step, 1)
                child = (*parent[:layer], lower, *parent[layer + 1 :])
                while lower + 1 < rank and self.problem.meets(
                    raised := (*parent[:layer], lower + 1, *parent[layer + 1 :])
                ):
                    lower, child = lower + 1, raised
                yield child

    def _order(self, one: ScoredRanks) -> tuple[float, float, Ranks]:
        """Best score first, then least energy discarded."""
        lost = math.fsum(table[rank] for table, rank in zip(self.discarded, one.ranks, strict=True))
        return -one.score, lost, one.ranks

    def _best(self) -> ScoredRanks:
        known = [ScoredRanks(ranks, score) for ranks, score in self.state.finished.items() if score is not None]
        return min(known, key=self._order)

    def _best_score(self) -> float:
        return max((score for score in self.state.finished.values() if score is not None), default=-math.inf)


def rank_steps(problem: RankProblem, step: int | float) -> list[int]:
    """Return the amounts by which a step lowers each layer's rank."""
    if isinstance(step, int):
        return [step] * len(problem.costs)
    return [max(1, round(step * problem.dense_cost / max(1, cost.per_rank))) for cost in problem.costs]


def discarded_energies(energies: Sequence[Tensor], device: torch.device) -> list[list[float]]:
    """For each layer and rank the fraction of the energy that is lost; the same numbers in every process."""
    tables = []
    for energy in energies:
        tail = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
        tables.append(tail / tail[0].clamp_min(torch.finfo(tail.dtype).tiny))
    if is_distributed():
        own = torch.cat(tables).to(device)
        first = sum_over_ranks(own if torch.distributed.get_rank() == 0 else torch.zeros_like(own))
        tables = list(first.split([len(table) for table in tables]))
    return [table.tolist() for table in tables]
