"""Record of the share of every layer that was kept over a training, of bounded length, and its figures."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_plugins._lightning import Trainer
from lightning_plugins.callbacks._compression.settings import CompressionSettings
from lightning_plugins.callbacks._monitors.figures import hand_to_loggers
from lightning_plugins.compression.reports.report import CompressionReport
from lightning_plugins.plots import choice_figure, compression_figure

_MOST = 200  # rows; beyond, every second one is dropped and half as many are added


class ChoiceRecord:
    """Rows of a step, the share of the cost, the kept share of every group of channels, and the rank of every layer.

    Added values stay on the device until the rows are requested, so that training steps need no synchronisation.
    """

    def __init__(self) -> None:
        self.every = 1
        self._rows: list[dict[str, Any]] = []

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows in the order of time, in plain numbers."""
        for row in self._rows:
            if not isinstance(row["share"], float):
                row.update(_plain(row))
        return self._rows

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
            share: The fraction of the cost that is left.
            kept: The share of units that stay, by group.
            ranks: The ranks, by layer.
            last: Whether to add it in any case.
        """
        if not last and (step % self.every or (self._rows and self._rows[-1]["step"] == step)):
            return
        numbers = [{name: _unread(value) for name, value in values.items()} for values in (kept, ranks)]
        self._rows.append({"step": step, "share": _unread(share), "kept": numbers[0], "ranks": numbers[1]})
        if len(self._rows) > _MOST:
            self.every *= 2
            self._rows = [row for row in self._rows if row["step"] % self.every == 0]

    def draw(self, trainer: Trainer, report: CompressionReport, settings: CompressionSettings) -> None:
        """Hand the figures to the loggers; on the first process.

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
        self.every, self._rows = state["every"], list(state["rows"])


def _unread(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).detach()


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a row, in one copy from the device."""
    kept, ranks = row["kept"], row["ranks"]
    values = [row["share"], *kept.values(), *ranks.values()]
    device = max((value.device for value in values), key=lambda device: device.type != "cpu")
    share, *others = torch.stack([value.to(device) for value in values]).tolist()
    return {
        "share": share,
        "kept": dict(zip(kept, others[: len(kept)], strict=True)),
        "ranks": dict(zip(ranks, others[len(kept) :], strict=True)),
    }
