"""Scores of candidates so far, exchanged between the processes that compute them."""

from collections.abc import Iterable, Sequence

import torch

from lightning_plugins.compression.rank_search.problem import Ranks
from lightning_plugins.distributed import sum_over_ranks


class Tally:
    """Sums and counts of the candidates' scores so far, and those that were given up.

    Args:
        members: The candidates.
    """

    def __init__(self, members: Iterable[Ranks]) -> None:
        self.sums = dict.fromkeys(members, 0.0)
        self.counts = dict.fromkeys(self.sums, 0.0)
        self.lost: set[Ranks] = set()

    def add(self, ranks: Ranks, total: float, count: float) -> None:
        """Add a batch's score of a candidate.

        Args:
            ranks: The candidate.
            total: Its sum over the batch.
            count: The number of terms.
        """
        self.sums[ranks] += total
        self.counts[ranks] += count

    def exchange(self, members: Sequence[Ranks], mine: set[Ranks], device: torch.device) -> None:
        """Exchange the results of the owners of candidates; a collective call.

        Args:
            members: The candidates.
            mine: Those that this process has scored.
            device: The device of the exchange.
        """
        rows = [
            (self.sums[ranks], self.counts[ranks], float(ranks in self.lost)) if ranks in mine else (0.0, 0.0, 0.0)
            for ranks in members
        ]
        table = sum_over_ranks(torch.tensor(rows, dtype=torch.float64, device=device)).tolist() if rows else []
        for ranks, (total, count, lost) in zip(members, table, strict=True):
            self.sums[ranks], self.counts[ranks] = total, count
            if lost:
                self.lost.add(ranks)
