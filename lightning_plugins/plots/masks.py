"""Figures of a compression under a budget: the fraction kept of every layer over training."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lightning_plugins._arguments import check_arguments
from lightning_plugins.plots.style import COLOURS, INK, MUTED, empty_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEIGHT = 0.24  # inches per layer


def choice_figure(rows: Sequence[Mapping[str, Any]], budget: float, *, title: str | None = None) -> "Figure":
    """Draw heat maps of the fraction kept of every layer over training, and the cost compared with its budget.

    Args:
        rows: Dicts in order of time with ``"step"``, ``"share"`` (of the cost, in [0, 1]), ``"kept"`` (the fraction of
            units kept, by channel group) and ``"ranks"`` (by layer); a row may lack groups or layers.
        budget: The fraction of the cost to keep.
        title: Title of the figure.

    Returns:
        A figure with an Agg canvas; ``figure.savefig("choice.png")`` writes it.

    Raises:
        ValueError: If there are no rows.
        ImportError: If matplotlib is missing.

    Example:
        >>> rows = [{"step": step, "share": 1 / (1 + step), "kept": {"stem": 1.0}, "ranks": {}} for step in range(3)]
        >>> [axes.get_ylabel() for axes in choice_figure(rows, 0.4).axes][:2]
        ['share of the cost', 'channels kept']
    """
    check_arguments(choice_figure, locals())
    if not rows:
        raise ValueError("`rows` must have at least one entry, got none")
    maps = [(key, label) for key, label in (("kept", "channels kept"), ("ranks", "rank")) if any(r[key] for r in rows)]
    counts = [len(_names(rows, key)) for key, _ in maps]
    height = 2.6 + sum(0.9 + _HEIGHT * count for count in counts)
    figure = empty_figure(width=8.0, height=height, title=title)
    grid = figure.subplots(1 + len(maps), 1, squeeze=False, height_ratios=[2.2, *(0.9 + _HEIGHT * c for c in counts)])
    steps = [int(row["step"]) for row in rows]
    top = grid[0][0]
    top.plot(steps, [row["share"] for row in rows], color=COLOURS[0], linewidth=2)
    top.axhline(budget, color=COLOURS[1], linewidth=1.2, linestyle="--")
    top.annotate(f"budget {budget:g}", (steps[0], budget), color=COLOURS[1], fontsize=9, va="bottom")
    top.set_ylim(0, None)
    style_axes(top, "training step", "share of the cost")
    for (key, label), axes in zip(maps, (row[0] for row in grid[1:]), strict=True):
        _draw_map(axes, rows, key, label)
    return figure


def _names(rows: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row[key]))


def _draw_map(axes: "Axes", rows: Sequence[Mapping[str, Any]], key: str, label: str) -> None:
    names = _names(rows, key)
    values = torch.tensor([[float(row[key].get(name, torch.nan)) for row in rows] for name in names])
    if key == "ranks":  # each on its own scale: its largest rank
        values = values / values.nan_to_num().amax(1, keepdim=True).clamp_min(1)
    edges = [float(row["step"]) for row in rows]
    edges.append(edges[-1] + (edges[-1] - edges[-2] if len(edges) > 1 else 1))
    edges = [edge + place * 1e-6 for place, edge in enumerate(edges)]  # two rows for one step: before and after
    mesh = axes.pcolormesh(
        edges, range(len(names) + 1), values.numpy(), vmin=0, vmax=1, cmap="viridis", rasterized=True
    )
    style_axes(axes, "training step", label)
    axes.grid(visible=False)
    axes.set_yticks([place + 0.5 for place in range(len(names))], names)
    axes.invert_yaxis()
    if axes.figure is not None:
        bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02, aspect=20)
        bar.set_label("share", color=INK, fontsize=9)
        bar.ax.tick_params(labelsize=8, colors=MUTED)
