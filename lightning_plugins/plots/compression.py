"""Figures of compression: the cost of every layer before and after."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_plugins._arguments import check_arguments
from lightning_plugins.compression.reports.report import CompressionReport, LayerChange
from lightning_plugins.plots.style import COLOURS, INK, MUTED, empty_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROW = 0.22  # inches per layer


def compression_figure(report: CompressionReport, *, title: str | None = None) -> "Figure":
    """Draw the cost of every layer before and after.

    A bar per layer, the first one on top: on the left its parameters, on the right its FLOPs if counted, before in a
    light and after in a strong colour, with the units and the rank kept if they were selected. The total removed is
    shown above, the budget, if any, and the measured time below.

    Unchanged layers with less than a hundredth of the parameters and FLOPs, such as norms, are omitted.

    Args:
        report: The result of `compression_report`, or the ``report`` of a compression callback.
        title: Title of the figure.

    Returns:
        A figure with an Agg canvas.

    Raises:
        ValueError: If the report has no layer.
        ImportError: If matplotlib is missing.

    Example:
        >>> import torch
        >>> from lightning_plugins.compression import compression_report, factorize
        >>> dense, small = (torch.nn.Sequential(torch.nn.Linear(20, 10)) for _ in range(2))
        >>> report = compression_report(dense, factorize(small, 2), torch.zeros(1, 20), latency=False)
        >>> compression_figure(report).axes[0].get_title(loc="left")
        'parameters: 210 → 70, 66.7% removed'
    """
    check_arguments(compression_figure, locals())
    if not report.layers:
        raise ValueError("`report` must have at least one layer, got none")
    layers = {name: change for name, change in report.layers.items() if _counts(change, report)} or report.layers
    figure = empty_figure(width=11.0, height=max(3.4, 1.6 + _ROW * len(layers)), title=title)
    before, after, notes = report.before, report.after, report.notes()
    kinds = [("parameters", before.params, after.params, report.params_ratio)]
    if before.flops is not None and after.flops is not None and report.flops_ratio is not None:
        kinds.append(("FLOPs", before.flops, after.flops, report.flops_ratio))
    (row,) = figure.subplots(1, len(kinds), sharey=True, squeeze=False)
    for column, (axes, (name, old, new, ratio)) in enumerate(zip(row, kinds, strict=True)):
        _draw_bars(axes, name, [(change.before[column] or 0, change.after[column] or 0) for change in layers.values()])
        axes.set_title(f"{name}: {old:,} → {new:,}, {ratio:.1%} removed", fontsize=10, color=INK, loc="left")
        axes.tick_params(labelleft=column == 0)
    for place, (name, change) in enumerate(layers.items()):  # behind the bars drawn last
        if name in notes:
            end = max(change.before[len(row) - 1] or 0, change.after[len(row) - 1] or 0)
            axes.annotate(f"  {notes[name]}", (end, place), va="center", fontsize=8, color=MUTED)
            axes.margins(x=0.25)
    row[0].set_yticks(range(len(layers)), list(layers), fontsize=8)
    row[0].set_ylim(len(layers) - 0.4, -0.6)
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    timing = report.timing()
    below = [report.within(), None if timing is None else f"one forward pass: {timing}"]
    if any(below):
        figure.supxlabel("\n".join(filter(None, below)), fontsize=9, color=INK)
    return figure


def _counts(change: LayerChange, report: CompressionReport) -> bool:
    size, whole = change.before, report.before
    large = size.params > whole.params / 100 or (size.flops or 0) > (whole.flops or 0) / 100
    return large or change.before != change.after


def _draw_bars(axes: "Axes", name: str, pairs: Sequence[tuple[int, int]]) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    rows = range(len(pairs))
    axes.barh(rows, [old for old, _ in pairs], color=COLOURS[4], height=0.75, label="before")
    axes.barh(rows, [new for _, new in pairs], color=COLOURS[0], height=0.45, label="after")
    style_axes(axes, name, "")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(visible=False, axis="y")
