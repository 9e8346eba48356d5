"""A network before and after compression: parameters, operations and time, per layer and in all."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import nn

from lightning_plugins._checks import check_bool, check_positive_int
from lightning_plugins.compression.costs.network_costs import (
    Inputs,
    Latency,
    LayerSize,
    NetworkCosts,
    check_inputs,
    check_model,
    measure_latencies,
    measure_network,
)
from lightning_plugins.compression.reports.table import build_table, milliseconds, removed, short

if TYPE_CHECKING:
    from rich.table import Table


class LayerChange(NamedTuple):
    """Costs of a layer before and after; zeros where there was none."""

    before: LayerSize
    after: LayerSize


class UnitsKept(NamedTuple):
    """Number of a layer's units, channels or heads, that stay.

    Attributes:
        left: How many stay.
        of: How many there were.
    """

    left: int
    of: int


@dataclass(frozen=True)
class CompressionReport:
    """Costs of a network before and after a compression.

    Attributes:
        before: Costs of the network before.
        after: Costs of the network after.
        kept: Units that stay, by the names of the layers that compute channels among which was chosen.
        cost: What there was a budget of, ``"params"`` or ``"flops"``; None without a budget.
        budget: The share of this cost that could be left; None without a budget.
    """

    before: NetworkCosts
    after: NetworkCosts
    kept: Mapping[str, UnitsKept] = field(default_factory=dict)
    cost: Literal["params", "flops"] | None = None
    budget: float | None = None

    @property
    def layers(self) -> dict[str, LayerChange]:
        """All layers of both networks by dotted name, in the original order; new names come last."""
        names = [*self.before.layers, *(name for name in self.after.layers if name not in self.before.layers)]
        nothing = LayerSize(0, 0 if self.counts_flops else None)
        return {
            name: LayerChange(self.before.layers.get(name, nothing), self.after.layers.get(name, nothing))
            for name in names
        }

    @property
    def ranks(self) -> dict[str, int]:
        """The ranks of the low-rank layers that were not there before, or of another rank."""
        return {name: rank for name, rank in self.after.ranks.items() if self.before.ranks.get(name) != rank}

    @property
    def share(self) -> float | None:
        """The remaining fraction of the budgeted cost; None without a budget."""
        if self.cost is None:
            return None
        before, after = getattr(self.before, self.cost), getattr(self.after, self.cost)
        return None if before is None or after is None else float(after / before)

    @property
    def counts_flops(self) -> bool:
        """True if the operations of both networks were counted."""
        return self.before.flops is not None and self.after.flops is not None

    @property
    def params_ratio(self) -> float:
        """Removed fraction of the parameters, the compression ratio of papers; `share` is the fraction left."""
        return removed(self.before.params, self.after.params)

    @property
    def flops_ratio(self) -> float | None:
        """Removed fraction of the operations; None where they were not counted."""
        before, after = self.before.flops, self.after.flops
        return None if before is None or after is None else removed(before, after)

    @property
    def speedup(self) -> float | None:
        """Ratio of the median times of a forward pass, before over after; None where the time was not measured."""
        if self.before.latency is None or self.after.latency is None:
            return None
        return self.before.latency.median_ms / self.after.latency.median_ms

    def __str__(self) -> str:
        """The totals on a line; `table` shows every layer."""
        kinds = [("parameters", self.before.params, self.after.params, self.params_ratio)]
        before, after, ratio = self.before.flops, self.after.flops, self.flops_ratio
        if before is not None and after is not None and ratio is not None:
            kinds.append(("FLOPs", before, after, ratio))
        parts = [f"{name} {short(old)} → {short(new)} ({gone:.1%} removed)" for name, old, new, gone in kinds]
        return ", ".join([*parts, *filter(None, (self.within(), self.timing()))])

    def table(self, *, all_layers: bool = False) -> "Table":
        """Lay the report out for a terminal: ``rich.print(report.table())``.

        Operations that were not counted have no columns.

        Args:
            all_layers: Whether layers that stayed as they were have rows of their own, instead of one for all.

        Returns:
            A rich table.

        Raises:
            ImportError: If rich is missing.
        """
        return build_table(
            self.layers,
            (self.before, self.after),
            notes=self.notes(),
            caption="\n".join(filter(None, (self.within(), self.timing()))) or None,
            counts_flops=self.counts_flops,
            all_layers=all_layers,
        )

    def notes(self) -> dict[str, str]:
        """Return the choice in words, by layer: units that stay, and ranks."""
        units = {name: f"{kept.left} of {kept.of}" for name, kept in self.kept.items()}
        ranks = {name: f"rank {rank}" for name, rank in self.ranks.items()}
        names = dict.fromkeys([*units, *ranks])
        return {name: ", ".join(part[name] for part in (units, ranks) if name in part) for name in names}

    def within(self) -> str | None:
        """Text with the budget and the remaining cost; None without a budget."""
        if self.budget is None or self.share is None:
            return None
        return (
            f"{self.share:.3g} of the {'FLOPs' if self.cost == 'flops' else 'parameters'} left, budget {self.budget:g}"
        )

    def timing(self) -> str | None:
        """The time before and after in words; None where it was not measured."""
        before, after, speedup = self.before.latency, self.after.latency, self.speedup
        if before is None or after is None or speedup is None:
            return None
        return (
            f"{milliseconds(before)} → {milliseconds(after)}: {speedup:.2f} times as fast "
            f"(median and quartiles of {after.runs} passes, {after.device})"
        )

    def to_json(self) -> str:
        """Write the report as JSON, including ratios.

        Returns:
            The text; `from_json` reads it.
        """
        ratios = {"params_ratio": self.params_ratio, "flops_ratio": self.flops_ratio, "speedup": self.speedup}
        choice = {"cost": self.cost, "budget": self.budget, "share": self.share, "ranks": self.ranks}
        kept = {name: units._asdict() for name, units in self.kept.items()}
        costs = {"before": _to_dict(self.before), "after": _to_dict(self.after)}
        return json.dumps({**ratios, **choice, "kept": kept, **costs}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "CompressionReport":
        """Read a report that `to_json` has written.

        Args:
            text: The JSON.

        Returns:
            The report.

        Raises:
            ValueError: If it is not one.
        """
        try:
            read = json.loads(text)
            kept = {name: UnitsKept(**units) for name, units in read["kept"].items()}
            return cls(_from_dict(read["before"]), _from_dict(read["after"]), kept, read["cost"], read["budget"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`text` must be what `to_json` writes, got {text[:40]!r}: {type(error).__name__}: {error}"
            ) from error


def compression_report(
    before: nn.Module | NetworkCosts,
    after: nn.Module,
    inputs: Inputs | None,
    *,
    latency: bool = True,
    repeats: int = 30,
) -> CompressionReport:
    """Compare what two networks cost: parameters, floating-point operations and the time of a forward pass.

    The operations are those that `torch.utils.flop_counter.FlopCounterMode` counts in one forward pass. The time is
    measured, after a warm-up, in turns of both networks if both are there. The networks run in evaluation mode and
    without gradients, and are left as they were. Low-rank layers and pruned ones stand beside the layers they replace.

    Args:
        before: The network before, or what `measure_network` said of it, so that no copy has to be kept.
        after: The network after.
        inputs: What both take, on their device: a tensor, a tuple of arguments, or a dict of keyword arguments; None,
            with ``latency=False``, to count parameters alone.
        latency: Whether to measure the time. With costs measured earlier they must have a time to compare with.
        repeats: How many passes of each network to time, after three that are not.

    Returns:
        The report.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If ``repeats`` is less than 1, ``inputs`` None with ``latency``, or a parameter without a shape
            (lazy).

    Example:
        >>> import torch
        >>> from lightning_plugins.compression import factorize
        >>> dense, small = (nn.Sequential(nn.Linear(20, 10)) for _ in range(2))
        >>> report = compression_report(dense, factorize(small, 2), torch.zeros(1, 20), latency=False)
        >>> report.layers["0"]
        LayerChange(before=LayerSize(params=210, flops=400), after=LayerSize(params=70, flops=120))
    """
    check_positive_int("repeats", repeats)
    check_bool("latency", latency)
    if not isinstance(before, NetworkCosts):
        check_model("before", before)
    check_model("after", after)
    if isinstance(before, NetworkCosts):
        if latency and before.latency is None:
            raise ValueError(
                "`before` must have a latency to compare with, got costs without; measure it with "
                "`measure_network(..., latency=True)`, or pass `latency=False`"
            )
        return CompressionReport(before, measure_network(after, inputs, latency=latency, repeats=repeats))
    given = check_inputs(inputs) if latency else None
    costs = [measure_network(model, inputs, latency=False) for model in (before, after)]
    if given is not None:
        times = measure_latencies([before, after], given, repeats)
        costs = [replace(own, latency=time) for own, time in zip(costs, times, strict=True)]
    return CompressionReport(costs[0], costs[1])


def _to_dict(costs: NetworkCosts) -> dict[str, Any]:
    return {
        "params": costs.params,
        "flops": costs.flops,
        "latency": None if costs.latency is None else costs.latency._asdict(),
        "layers": {name: size._asdict() for name, size in costs.layers.items()},
        "ranks": dict(costs.ranks),
    }


def _from_dict(read: dict[str, Any]) -> NetworkCosts:
    layers = {name: LayerSize(**size) for name, size in read["layers"].items()}
    latency = None if read["latency"] is None else Latency(**read["latency"])
    return NetworkCosts(layers, latency, read["ranks"])
