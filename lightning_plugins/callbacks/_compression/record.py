"""What was kept of every layer over a training, of bounded length, and its pictures."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_plugins._lightning import Trainer
from lightning_plugins.callbacks._compression.settings import CompressionSettings
from lightning_plugins.callbacks._monitors.figures import hand_to_loggers
from lightning_plugins.compression.reports.report import CompressionReport
from lightning_plugins.plots import choice_figure, compression_figure

_MOST = 200  # rows; beyond, every second one is dropped and half as many are added


class ChoiceRecord:
    """Rows of a step, the share of the cost, the kept share of every group of channels, and the rank of every layer."""

    def __init__(self) -> None:
        self.every = 1
        self.rows: list[dict[str, Any]] = []

    def add(
        self,
        step: int,
        share: Tensor | float,
        kept: Mapping[str, Tensor | float],
        ranks: Mapping[str, Tensor | float],
        *,
        last: bool = False,
    ) -> None:
        """Add a row if it is time.

        Args:
            step: Optimizer steps done.
            share: The share of the cost that is left.
            kept: The share of units that stay, by group.
            ranks: The ranks, by layer.
            last: Whether to add it in any case.
        """
        if not last and (step % self.every or (self.rows and self.rows[-1]["step"] == step)):
            return
        numbers = [{name: float(value) for name, value in values.items()} for values in (kept, ranks)]
        self.rows.append({"step": step, "share": float(share), "kept": numbers[0], "ranks": numbers[1]})
        if len(self.rows) > _MOST:
            self.every *= 2
            self.rows = [row for row in self.rows if row["step"] % self.every == 0]

    def draw(self, trainer: Trainer, report: CompressionReport, settings: CompressionSettings) -> None:
        """Hand the pictures to the loggers; on rank zero.

        Args:
            trainer: The Trainer.
            report: The callback's report.
            settings: Its settings.
        """
        title = f"{settings.cost} within {settings.budget:.0%}"
        hand_to_loggers(trainer, "compression/choice", choice_figure(self.rows, settings.budget, title=title))
        hand_to_loggers(trainer, "compression", compression_figure(report, title=title))

    def state_dict(self) -> dict[str, Any]:
        """The rows."""
        return {"every": self.every, "rows": list(self.rows)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: From `state_dict`.
        """
        self.every, self.rows = state["every"], list(state["rows"])
