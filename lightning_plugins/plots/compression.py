"""Figures of compression: what every layer cost before and costs after."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_plugins.compression.report import CompressionReport, LayerChange
from lightning_plugins.plots._style import COLOURS, INK, empty_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROW = 0.22  # inches of a layer in a list


def compression_figure(report: CompressionReport, *, title: str | None = None) -> "Figure":
    """Draw what every layer cost before and costs after.

    A bar per layer, the first one on top: on the left its parameters, on the right its operations, before in a light
    and after in a strong colour. Above stands what was removed in all and, where it was measured, the time.

    Layers that stayed as they were and have less than a hundredth of the parameters and of the operations, as norms
    have, are left out.

    Args:
        report: What `compression_report` returns.
        title: What stands above the figure.

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
    if not report.layers:
        raise ValueError("`report` must have at least one layer, got none")
    layers = {name: change for name, change in report.layers.items() if _counts(change, report)} or report.layers
    figure = empty_figure(width=11.0, height=max(3.4, 1.6 + _ROW * len(layers)), title=title)
    left, right = figure.subplots(1, 2, sharey=True)
    before, after = report.before, report.after
    sizes = {
        "parameters": (left, 0, before.params, after.params, report.params_ratio),
        "FLOPs": (right, 1, before.flops, after.flops, report.flops_ratio),
    }
    for name, (axes, column, old, new, ratio) in sizes.items():
        pairs = [(change.before[column], change.after[column]) for change in layers.values()]
        _draw_bars(axes, name, pairs)
        axes.set_title(f"{name}: {old:,} → {new:,}, {ratio:.1%} removed", fontsize=10, color=INK, loc="left")
    left.set_yticks(range(len(layers)), list(layers), fontsize=8)
    left.set_ylim(len(layers) - 0.4, -0.6)
    right.tick_params(labelleft=False)
    figure.legend(*right.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    if (timing := report.timing()) is not None:
        figure.supxlabel(f"one forward pass: {timing}", fontsize=9, color=INK)
    return figure


def _counts(change: LayerChange, report: CompressionReport) -> bool:
    size, whole = change.before, report.before
    return change.before != change.after or size.params > whole.params / 100 or size.flops > whole.flops / 100


def _draw_bars(axes: "Axes", name: str, pairs: Sequence[tuple[int, int]]) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    rows = range(len(pairs))
    axes.barh(rows, [old for old, _ in pairs], color=COLOURS[4], height=0.75, label="before")
    axes.barh(rows, [new for _, new in pairs], color=COLOURS[0], height=0.45, label="after")
    style_axes(axes, name, "")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(visible=False, axis="y")
