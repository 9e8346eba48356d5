"""Style of all figures: colours that colour-blind readers can distinguish, canvases and axes.

The figures are built without pyplot, so they are safe in threads, work without a display and do not affect a user's own
figures. matplotlib is imported when a figure is drawn.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import ColorType

INK, MUTED, GRID = "#222222", "#6b6b6b", "#e4e4e4"
# Okabe and Ito's colours, distinguishable for colour-blind readers; without the yellow, too pale for lines on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def has_matplotlib() -> bool:
    """Return whether figures can be drawn."""
    return find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Raise an error with installation advice if figures cannot be drawn.

    Raises:
        ImportError: If matplotlib is missing.
    """
    if not has_matplotlib():
        raise ImportError("figures need matplotlib; run `pip install 'lightning-plugins[plots]'`")


def empty_figure(width: float, height: float, title: str | None) -> "Figure":
    """Return a figure of this size in inches, on a canvas that needs no display."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    if title is not None:
        figure.suptitle(title, fontsize=13, color=INK, x=0.012, ha="left")
    return figure


def colour_by_step(axes: "Axes", steps: Sequence[int]) -> "list[ColorType]":
    """One colour per step, from dark to light, and their colour bar beside ``axes``."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    readable = ListedColormap(colormaps["viridis"](torch.linspace(0.0, 0.88, 256).numpy()))  # no pale yellow
    shade = ScalarMappable(Normalize(min(steps), max(*steps, min(steps) + 1)), readable)
    if len(steps) > 1 and axes.figure is not None:
        bar = axes.figure.colorbar(shade, ax=axes, pad=0.02, aspect=30)
        bar.set_label("training step", color=INK, fontsize=10)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=9, colors=MUTED)
    rows: list[ColorType] = [tuple(row) for row in shade.to_rgba(torch.tensor(steps).numpy())]
    return rows


def style_axes(axes: "Axes", xlabel: str, ylabel: str) -> None:
    """Label the axes and draw them in the common style."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(xlabel, color=INK, fontsize=10)
    axes.set_ylabel(ylabel, color=INK, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(labelsize=9, colors=MUTED, which="both", length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
