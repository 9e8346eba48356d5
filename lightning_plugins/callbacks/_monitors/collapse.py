"""Measure of collapse of one layer: the rows of a step, or of a queue, over all processes, and their metric."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_plugins._checks import check_finite_number, check_fraction, check_positive_int
from lightning_plugins.distributed import gather_row_counts, gather_rows, is_distributed
from lightning_plugins.functional.spectrum import at_least_float32, exact, full_precision, normalize_rows
from lightning_plugins.metrics import (
    EffectiveRank,
    FeatureStableRank,
    Isotropy,
    RankMe,
    VonNeumannEntropy,
)
from lightning_plugins.metrics.gram import GramMetric, GramStatistics

METRICS: dict[str, type[GramMetric]] = {
    "effective_rank": EffectiveRank,
    "entropy": VonNeumannEntropy,
    "isotropy": Isotropy,
    "rankme": RankMe,
    "stable_rank": FeatureStableRank,
}
RANKS = ("effective_rank", "rankme", "stable_rank")  # of which a share of the width can be asked for


@dataclass(frozen=True, kw_only=True)
class CollapseLimits:
    """Limits below which measurements of `CollapseAlarm` are too low, and how many in a row raise the alarm.

    A measurement is too low if it is below any limit that is given, or not a number. At least one must be given.

    Attributes:
        minimum: The lowest acceptable value.
        share: The least share, in [0, 1], of the most that a rank could be (the number of features, or of rows if there
            are fewer) that is not too low; for the ranks only.
        drop: How far below its best so far the metric may fall, as a share of the best, in [0, 1].
        patience: How many measurements in a row must be too low, at least 1.

    Raises:
        ValueError: If a field is out of its range, or there is no limit.
        TypeError: If a field is of the wrong type.

    Example:
        >>> CollapseLimits(share=0.1, patience=3).patience
        3
    """

    minimum: float | None = None
    share: float | None = None
    drop: float | None = None
    patience: int = 1

    def __post_init__(self) -> None:
        for name, check in (("minimum", check_finite_number), ("share", check_fraction), ("drop", check_fraction)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check(name, getattr(self, name)))
        object.__setattr__(self, "patience", check_positive_int("patience", self.patience))
        if self.minimum is None and self.share is None and self.drop is None:
            raise ValueError("`minimum`, `share` or `drop` must say what is too low, got none; try `share=0.1`")


@dataclass
class Rows:
    """Rows of a layer since the last measurement.

    Attributes:
        gram: Sum of the products of rows, ``(d, d)``; of this process, or of the queue.
        count: Number of rows summed.
        queue: The latest rows of all processes, ``(q, d)``; None without a queue.
    """

    gram: Tensor | None = None
    count: int = 0
    queue: Tensor | None = None


@dataclass
class CollapseMeasure:
    """One metric of several layers, from summed statistics or from a queue of rows.

    Attributes:
        metric: A name out of `METRICS`.
        queue_size: How many rows of earlier batches join; 0 for none.
        rows: By layer, what is known.
    """

    metric: str
    queue_size: int = 0
    rows: dict[str, Rows] = field(default_factory=dict)

    def add(self, label: str, calls: Sequence[Tensor], device: torch.device) -> None:
        """Take the rows of a step from one layer; with a queue all processes must, at the same time.

        Args:
            label: The layer.
            calls: For each call of the layer a tensor of shape ``(N, d)``; there may be none.
            device: Where this process's tensors are.
        """
        own = self.rows.setdefault(label, Rows())
        if self.queue_size:
            for index in range(max(gather_row_counts(len(calls)))):
                self._remember(own, calls[index] if index < len(calls) else None, device)
            return
        for call in calls:
            rows = self._rows(call)
            with full_precision(rows):
                product = rows.T @ rows
            own.gram = product if own.gram is None else own.gram + product
            own.count += len(rows)

    def values(self, labels: Sequence[str], device: torch.device) -> tuple[dict[str, float], dict[str, int]]:
        """Measure and reset; a collective call with the same result on all processes.

        Args:
            labels: All layers, in the same order on every process.
            device: Where this process's tensors are.

        Returns:
            By layer of which any process has seen rows: the metric, and the most that a rank could be, the smaller of
            the numbers of rows and features.
        """
        found: dict[str, Tensor] = {}
        most: dict[str, int] = {}
        for label in labels:
            gram, count = self._statistics(self.rows.setdefault(label, Rows()), device)
            if count:
                statistics = GramStatistics(gram, torch.tensor(count, device=gram.device))
                found[label] = statistics.or_nan(METRICS[self.metric].from_statistics(statistics)).double()
                most[label] = min(count, len(gram))
        if not found:
            return {}, {}
        together = torch.stack(list(found.values()))
        if is_distributed():  # processes on unlike hardware would differ in the last digit, and act differently
            dist.broadcast(together, 0)
        return dict(zip(found, together.tolist(), strict=True)), most

    def state(self) -> dict[str, Tensor]:
        """The queues, for a checkpoint."""
        return {label: own.queue.clone() for label, own in self.rows.items() if own.queue is not None}

    def load_state(self, queues: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint's queues."""
        self.rows = {label: Rows(queue=queue) for label, queue in queues.items()}

    def _remember(self, own: Rows, embeddings: Tensor | None, device: torch.device) -> None:
        """The newest rows of all processes; one that has none takes part as well."""
        width = max(gather_row_counts(0 if embeddings is None else embeddings.shape[1]))
        block = torch.empty(0, width, device=device) if embeddings is None else at_least_float32(embeddings.detach())
        counts = gather_row_counts(len(block))
        blocks = gather_rows(block, counts)
        kept = [] if own.queue is None else [own.queue.to(block)]
        own.queue = torch.cat([*kept, *blocks])[-max(self.queue_size, sum(counts)) :].detach()

    def _statistics(self, own: Rows, device: torch.device) -> tuple[Tensor, int]:
        if self.queue_size:
            if own.queue is None:
                return torch.zeros(1, 1, device=device), 0
            own.queue = own.queue.to(device)
            rows = self._rows(own.queue)
            with full_precision(rows):
                return rows.T @ rows, len(rows)
        gram, count = own.gram, own.count
        own.gram, own.count = None, 0
        if not is_distributed():
            return (torch.zeros(1, 1, device=device), 0) if gram is None else (gram, count)
        count = sum(gather_row_counts(count))
        width = max(gather_row_counts(0 if gram is None else len(gram)))  # a process may have seen no rows
        if not count:
            return torch.zeros(1, 1, device=device), 0
        if gram is None:
            gram = exact(torch.zeros(width, width, device=device))
        dist.all_reduce(gram)
        return gram, count

    def _rows(self, embeddings: Tensor) -> Tensor:
        rows = exact(embeddings.detach())
        return normalize_rows(rows) if METRICS[self.metric].unit_rows else rows
