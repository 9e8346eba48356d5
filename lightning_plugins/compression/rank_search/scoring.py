"""Scores of many rank vectors on the same batches, with no more work than finding the best takes."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from lightning_plugins.compression.rank_search.prefix_reuse import PrefixReuse
from lightning_plugins.compression.rank_search.problem import Ranks
from lightning_plugins.compression.rank_search.tally import Tally
from lightning_plugins.compression.rank_search.truncation import TruncatedWeights
from lightning_plugins.distributed import is_distributed, sum_over_ranks, world_size

ScoreValue = float | Tensor | tuple[float | Tensor, float | Tensor]
Score = Callable[[Any, Any], ScoreValue]

_SLACK = 1e-9  # of the bounds' width: far above what rounding does to a sum, far below what one sample does to a mean


class Contest(NamedTuple):
    """Candidates of which only the best are wanted.

    Attributes:
        members: The candidates.
        keep: How many are wanted.
        floor: A score below which none is wanted.
    """

    members: Sequence[Ranks]
    keep: int
    floor: float = -math.inf


class CandidateScores:
    """Scores rank vectors: batches outermost, so that one batch's activations are in memory, and similar ones in turn.

    Args:
        model: The network, in evaluation mode.
        batches: What can be iterated again and again, with the same batches in the same order.
        score: Gives the score of a batch.
        weights: Sets the layers' ranks.
        reuse: Keeps what consecutive runs have in common.
        bounds: Minimum and maximum possible score; None if unbounded, and nothing is abandoned.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        score: Score,
        weights: TruncatedWeights,
        reuse: PrefixReuse,
        bounds: tuple[float, float] | None,
    ) -> None:
        self._model, self._batches, self._score = model, batches, score
        self._weights, self._reuse, self._bounds = weights, reuse, bounds
        self._names = list(reuse.first_calls())
        self._order = list(range(len(self._names)))  # layers as they are called
        self._counts: list[float] = []  # of every batch
        self._tally = Tally(())

    def first(self, ranks: Ranks) -> float:
        """Score the first rank vector of a search, and learn about the model and the batches from it.

        Returns:
            Its score.

        Raises:
            ValueError: If there are no batches, a layer is not called, or processes were given different batches.
        """
        self._tally = Tally([ranks])
        for number, batch in enumerate(self._batches):
            counts = self._run(number, batch, [ranks])
            self._counts.append(counts[0])
            if number == 0:
                if uncalled := self._reuse.uncalled():
                    raise ValueError(
                        f"`layers`: {uncalled[0]!r} must be called when `score` runs the model, but was not on the "
                        f"first batch ({len(uncalled)} of {len(self._names)} layers); leave it out"
                    )
                called = list(self._reuse.first_calls().values())
                self._order.sort(key=called.__getitem__)
        if not self._counts:
            raise ValueError("`batches` must give at least one batch, got none")
        if not sum(self._counts) > 0:
            raise ValueError(f"`score` must count something: the counts of all batches add up to {sum(self._counts)}")
        total, mean = self._tally.sums[ranks], self._mean(ranks)
        if is_distributed():
            mine = torch.tensor([total, mean, float(len(self._counts))], dtype=torch.float64, device=self._device())
            if not torch.equal(sum_over_ranks(mine), mine * world_size()) and math.isfinite(total):
                raise ValueError(
                    "`batches` must be the same on every process, since each scores its share of the candidates on "
                    f"all of them; but process {dist.get_rank()} scores the start with {mean!r} and others do not; "
                    "leave out the distributed sampler"
                )
        return self._checked(mean)

    def best(self, contests: Sequence[Contest]) -> dict[Ranks, float | None]:
        """Score the members of every contest.

        Returns:
            The score of every candidate; None for those that were given up because they cannot be among the best of
            their contest, whatever the remaining batches give.
        """
        members = sorted((ranks for contest in contests for ranks in contest.members), key=self._call_order)
        self._weights.forget(all_but=members)
        self._tally = Tally(members)
        if self._bounds is None or len(self._counts) == 1:
            self._share(members, range(len(self._counts)))
        else:
            self._share(members, range(1))
            leaders = {ranks for contest in contests for ranks in self._leaders(contest)}
            self._share([ranks for ranks in members if ranks in leaders], range(1, len(self._counts)))
            others = [ranks for ranks in members if ranks not in leaders]
            self._share(others, range(1, len(self._counts)), contests)
        lost = self._tally.lost
        return {ranks: None if ranks in lost else self._checked(self._mean(ranks)) for ranks in members}

    def _leaders(self, contest: Contest) -> list[Ranks]:
        return sorted(contest.members, key=lambda ranks: -self._tally.sums[ranks])[: contest.keep]

    def _share(self, members: Sequence[Ranks], numbers: range, contests: Sequence[Contest] = ()) -> None:
        """Score this process's share on some of the batches, and exchange what came out."""
        mine = self._portion(members)
        left = list(mine)
        for number, batch in self._numbered(numbers) if left else ():
            if not (left := self._without_hopeless(left, number, contests)):
                break
            counts = self._run(number, batch, left)
            if self._bounds is not None and any(count != self._counts[number] for count in counts):
                raise ValueError(
                    f"`score` must count the same for every network when there are `bounds`, got {counts} and "
                    f"{self._counts[number]} on batch {number}"
                )
        if is_distributed():
            self._tally.exchange(members, set(mine), self._device())

    def _portion(self, members: Sequence[Ranks]) -> Sequence[Ranks]:
        """Consecutive members, so that they have much in common, with about as much to compute on every process."""
        if not is_distributed():
            return members
        work, previous = [], None
        for ranks in map(self._call_order, members):
            pairs = enumerate(zip(ranks, previous or ranks, strict=True))
            work.append(len(ranks) - next((layer for layer, (one, other) in pairs if one != other), 0))
            previous = ranks
        done, total, owners = 0, sum(work), []
        for part in work:
            owners.append((2 * done + part) * world_size() // (2 * total))  # by the middle of its work
            done += part
        return [ranks for ranks, owner in zip(members, owners, strict=True) if owner == dist.get_rank()]

    def _numbered(self, numbers: range) -> Iterator[tuple[int, Any]]:
        """The batches of these numbers.

        Yields:
            Number and batch.

        Raises:
            ValueError: If there are fewer than there were.
        """
        reached = 0
        for number, batch in enumerate(self._batches):
            if number in numbers:
                yield number, batch
            reached = number + 1
            if reached == numbers.stop:
                return
        raise ValueError(
            f"`batches` must give the same batches at every pass, got {reached} after {len(self._counts)} at the first"
        )

    def _without_hopeless(self, members: list[Ranks], number: int, contests: Sequence[Contest]) -> list[Ranks]:
        """Give up the members that cannot win any more with the batches from ``number`` on."""
        if self._bounds is None or not contests:
            return members
        least, most = self._bounds
        rest, total = sum(self._counts[number:]), sum(self._counts)
        tally, running = self._tally, set(members)
        for contest in contests:
            known = sorted(
                (tally.sums[ranks] + least * (total - tally.counts[ranks])) / total for ranks in contest.members
            )
            wanted = max(contest.floor, known[-contest.keep] if len(known) >= contest.keep else -math.inf)
            wanted -= _SLACK * (most - least)
            tally.lost.update(
                ranks
                for ranks in running.intersection(contest.members)
                if (tally.sums[ranks] + most * rest) / total < wanted
            )
        return [ranks for ranks in members if ranks not in tally.lost]

    def _run(self, number: int, batch: Any, members: Sequence[Ranks]) -> list[float]:
        """Add the scores of one batch, and return the counts."""
        values, previous = [], None
        for ranks in members:
            self._weights.apply(ranks)
            self._reuse.start(None if previous is None else self._changed(previous, ranks))
            previous = ranks
            values.append(_sum_and_count(self._score(self._model, batch)))
        table = torch.stack([part for pair in values for part in pair]).tolist()  # the only synchronisation
        counts = table[1::2]
        for ranks, total, count in zip(members, table[::2], counts, strict=True):
            self._check_bounds(total, count, number)
            self._tally.add(ranks, total, count)
        return counts

    def _changed(self, before: Ranks, after: Ranks) -> list[str]:
        return [name for name, old, new in zip(self._names, before, after, strict=True) if old != new]

    def _call_order(self, ranks: Ranks) -> Ranks:
        return tuple(ranks[layer] for layer in self._order)

    def _mean(self, ranks: Ranks) -> float:
        return self._tally.sums[ranks] / self._tally.counts[ranks]

    def _checked(self, mean: float) -> float:
        if not math.isfinite(mean):
            raise ValueError(f"`score` must be finite, got {mean!r} as the mean over all batches")
        return mean

    def _check_bounds(self, total: float, count: float, number: int) -> None:
        if self._bounds is None or not math.isfinite(total):
            return
        least, most = (bound * count for bound in self._bounds)
        slack = 1e-6 * (abs(least) + abs(most))
        if not least - slack <= total <= most + slack:
            raise ValueError(
                f"`bounds` must hold every score: they are {self._bounds}, got on batch {number} a sum of {total} with "
                f"a count of {count}"
            )

    def _device(self) -> torch.device:
        return next(self._model.parameters()).device


def check_batches(batches: Iterable[Any]) -> None:
    """Raise an error unless it can be iterated repeatedly with the same batches.

    Raises:
        TypeError: If ``batches`` is not iterable.
        ValueError: If it is an iterator, which is exhausted after one pass, or a loader that shuffles.
    """
    if not isinstance(batches, Iterable) or (isinstance(batches, Tensor) and batches.ndim == 0):
        raise TypeError(f"`batches` must be a DataLoader or another iterable of batches, got {type(batches).__name__}")
    if isinstance(batches, Iterator):
        raise ValueError(
            f"`batches` must be iterable repeatedly, got a {type(batches).__name__}, which is exhausted after one "
            "pass; pass a list of it"
        )
    if isinstance(batches, DataLoader) and isinstance(batches.sampler, RandomSampler):
        raise ValueError(
            "`batches` must give the same batches at every pass, got a DataLoader that shuffles; set `shuffle=False`"
        )


def _sum_and_count(value: ScoreValue) -> tuple[Tensor, Tensor]:
    parts = value if isinstance(value, tuple) else (value, 1.0)
    if len(parts) != 2:
        raise ValueError(f"`score` must return a mean or a pair (sum, count), got a tuple of {len(parts)}")
    total, count = (_number(part) for part in parts)
    return total, count.to(total.device)


def _number(part: object) -> Tensor:
    if isinstance(part, int | float):
        part = torch.tensor(part, dtype=torch.float64)
    if not isinstance(part, Tensor) or part.is_complex():
        raise TypeError(
            "`score` must return a number, a tensor with one element, or a pair (sum, count) of these, got "
            f"{type(part).__name__}"
        )
    if part.numel() != 1:
        raise ValueError(
            f"`score` must return one number per batch, got a tensor of shape {tuple(part.shape)}; take its mean"
        )
    return part.detach().reshape(()).to(torch.float64)
