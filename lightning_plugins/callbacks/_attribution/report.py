"""The scores of attribution methods: a table for the terminal, and JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class AttributionReport:
    """Results of an evaluation.

    Attributes:
        scores: By method (``"gradcam"``, or ``"gradcam/abs"`` for absolute values) and metric: ``score``, ``random``,
            ``skill``, and ``samples``, the number of samples with a score. Random maps have a row of their own.
        samples: Number of selected samples.
        seen: Number of samples they were selected from.
        curves: By method, the scaled mean degradation curves, ``least`` and ``most`` relevant first, of each class.
    """

    scores: Mapping[str, Mapping[str, Mapping[str, float]]]
    samples: int
    seen: int
    curves: Mapping[str, Mapping[str, list[list[float]]]] = field(default_factory=dict)

    def table(self) -> "Table":
        """Lay the scores out for a terminal.

        Returns:
            A rich table, one row for each method; skill in brackets.

        Raises:
            ImportError: If rich is missing.
        """
        try:
            from rich.table import Table
        except ImportError as error:
            raise ImportError("tables need rich; run `pip install 'lightning-plugins[cli]'`") from error
        table = Table(title="Attributions", caption=f"{self.samples} of {self.seen} samples; in brackets the skill")
        table.add_column("method", overflow="fold")
        metrics = list(dict.fromkeys(name for row in self.scores.values() for name in row))
        for name in metrics:
            table.add_column(name, justify="right")
        for method, row in self.scores.items():
            cells = [_cell(row[name]) if name in row else "" for name in metrics]
            table.add_row(method, *cells, style="dim" if method == "random" else None)
        return table

    def to_json(self) -> str:
        """Write everything as JSON; numbers that are not defined are null.

        Returns:
            The text.
        """
        scores = {
            method: {name: {key: _number(value) for key, value in cell.items()} for name, cell in row.items()}
            for method, row in self.scores.items()
        }
        curves = {
            method: {order: [[_number(value) for value in curve] for curve in rows] for order, rows in pair.items()}
            for method, pair in self.curves.items()
        }
        return json.dumps({"samples": self.samples, "seen": self.seen, "scores": scores, "curves": curves}, indent=1)


def _number(value: float) -> float | None:
    return value if value == value else None  # NaN is not JSON


def _cell(cell: Mapping[str, float]) -> str:
    skill = cell["skill"]
    return f"{cell['score']:.3f}" + (f" ({skill:+.2f})" if skill == skill else "")
