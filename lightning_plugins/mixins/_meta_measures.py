"""Losses and metrics of few-shot tasks over a validation or test epoch, one set per data loader."""

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection

from lightning_plugins.distributed import gather_row_counts
from lightning_plugins.meta import Episodes


class Measures(nn.Module):
    """The mean loss over tasks, as sums that are exact over ranks, and the user's metrics.

    Args:
        stage: Prefix of the names.
        metrics: The user's; copied for every loader.
    """

    def __init__(self, stage: str, metrics: MetricCollection | None) -> None:
        super().__init__()
        self.stage = stage
        self.losses = nn.ModuleList()
        self.metrics = nn.ModuleList()
        self._template = (None if metrics is None else metrics.clone(prefix=f"{stage}/"),)  # not a submodule
        self._grow(1, torch.device("cpu"))

    def updated(self, episodes: Episodes, targets: Any, loader: int) -> dict[str, Metric]:
        """Update with a batch, and return the metrics by logged name."""
        losses = episodes.losses.detach()
        self._grow(loader + 1, losses.device)
        loss: Any = self.losses[loader]
        loss.update(losses)
        named: dict[str, Metric] = {f"{self.stage}/loss": loss}
        if self.metrics:
            metrics: Any = self.metrics[loader]
            for outputs, wanted in _alike(episodes.outputs, targets):
                metrics.update(outputs, wanted)
            named.update(metrics.items(keep_base=False))
        return named

    def _grow(self, count: int, device: torch.device) -> None:
        for _ in range(len(self.losses), count):
            self.losses.append(MeanMetric().set_dtype(torch.float64).to(device))
            if self._template[0] is not None:
                self.metrics.append(self._template[0].clone().to(device))


def collection_of(metrics: dict[str, Metric] | None) -> MetricCollection | None:
    """Check the user's metrics."""
    if metrics is not None and not isinstance(metrics, dict):
        raise TypeError(f"`metrics` must be a dictionary of names and metrics, got {type(metrics).__name__}")
    for name, metric in (metrics or {}).items():
        if not isinstance(metric, Metric):
            raise TypeError(f"`metrics[{name!r}]` must be a torchmetrics Metric, got {type(metric).__name__}")
    return MetricCollection({**metrics}) if metrics else None


def as_part_of_all(loss: Tensor, tasks: int) -> Tensor:
    """The mean over this rank's tasks, weighted so that its mean over ranks is the mean over all tasks."""
    counts = gather_row_counts(tasks)
    return loss if len(counts) == 1 else loss * (tasks * len(counts) / sum(counts))


def _alike(outputs: Any, targets: Any) -> list[tuple[Any, Any]]:
    """Outputs and targets of all tasks together, or per task if the tasks differ in size."""
    if isinstance(outputs, Tensor) and isinstance(targets, Tensor):
        return [(outputs.detach(), targets)]
    if isinstance(targets, list | Tensor):
        return [(output.detach()[None], target[None]) for output, target in zip(outputs, targets, strict=True)]
    return [(outputs.detach() if isinstance(outputs, Tensor) else outputs, targets)]
