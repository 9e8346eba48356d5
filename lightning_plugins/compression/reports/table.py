"""A compression's report laid out for a terminal, and its numbers in words."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_plugins.compression.costs.network_costs import Latency, LayerSize, NetworkCosts

if TYPE_CHECKING:
    from rich.table import Table


def build_table(
    layers: Mapping[str, tuple[LayerSize, LayerSize]],
    totals: tuple[NetworkCosts, NetworkCosts],
    *,
    notes: Mapping[str, str],
    caption: str | None,
    counts_flops: bool,
    all_layers: bool,
) -> "Table":
    """See `CompressionReport.table`.

    Args:
        layers: The cost of each layer before and after.
        totals: The costs of the network before and after.
        notes: Kept units and ranks by layer.
        caption: The line below the table.
        counts_flops: Whether floating-point operations were counted.
        all_layers: Whether layers that stayed as they were have rows.

    Returns:
        The table.

    Raises:
        ImportError: If rich is missing.
    """
    try:
        from rich.table import Table
    except ImportError as error:
        raise ImportError("tables need rich; run `pip install 'lightning-plugins[cli]'`") from error
    table = Table(title="Compression")
    table.add_column("layer", overflow="fold")
    columns = (0, 1) if counts_flops else (0,)
    for column in columns:
        for name in (("parameters", "FLOPs")[column], "→", "removed"):
            table.add_column(name, justify="right")
    if notes:
        table.add_column("kept")
    same = [name for name, change in layers.items() if change[0] == change[1] and name not in notes]
    for name, change in layers.items():
        if all_layers or name not in same:
            table.add_row(name, *_cells(change, columns), *([notes.get(name, "")] if notes else []))
    if same and not all_layers:
        rest = NetworkCosts({name: layers[name][0] for name in same})
        table.add_row(f"{len(same)} other layers", *_cells(_totals(rest, rest), columns), style="dim")
    table.add_section()
    table.add_row("total", *_cells(_totals(*totals), columns), style="bold")
    table.caption = caption
    return table


def removed(before: int, after: int) -> float:
    """The fraction that is gone."""
    return 1 - after / before if before else 0.0


def short(value: int) -> str:
    """A number in three digits and a unit."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:.0f} {unit}"
    return str(value)


def milliseconds(latency: Latency) -> str:
    """A time, and its quartiles."""
    return f"{latency.median_ms:.3g} ms ({latency.low_ms:.3g} to {latency.high_ms:.3g})"


def _totals(before: NetworkCosts, after: NetworkCosts) -> tuple[LayerSize, LayerSize]:
    return LayerSize(before.params, before.flops), LayerSize(after.params, after.flops)


def _cells(change: tuple[LayerSize, LayerSize], columns: Sequence[int]) -> list[str]:
    cells = []
    for column in columns:
        before, after = (size[column] or 0 for size in change)
        cells += [short(before), short(after), f"{removed(before, after):.1%}" if before != after else ""]
    return cells
