"""Trade-off figures of score against size, for several methods."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from math import isfinite
from typing import TYPE_CHECKING

import torch

from lightning_plugins._arguments import check_arguments
from lightning_plugins.plots.style import COLOURS, INK, MUTED, empty_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Mapping[float, Sequence[float]]


def trade_off_figure(
    methods: Mapping[str, Points],
    *,
    xlabel: str,
    ylabel: str,
    reference: tuple[str, float] | None = None,
    title: str | None = None,
) -> "Figure":
    """Draw a score against a size for several methods: a line through the means, and one dot per run.

    Args:
        methods: Scores by method name: for every size those of all runs.
        xlabel: Label of the sizes, such as ``"parameters removed"``.
        ylabel: Label of the scores, such as ``"accuracy"``.
        reference: Name and score of a reference, drawn as a dashed line.
        title: Title of the figure.

    Returns:
        A figure with an Agg canvas; ``figure.savefig("trade_off.png")`` writes it.

    Raises:
        ValueError: If there is no method, a method has no score for a size, or a number is not finite.
        ImportError: If matplotlib is missing.

    Example:
        >>> methods = {"truncation": {0.5: [0.9], 0.8: [0.4]}, "BSR": {0.5: [0.97, 0.98], 0.8: [0.96, 0.97]}}
        >>> figure = trade_off_figure(methods, xlabel="removed", ylabel="accuracy", reference=("dense", 0.98))
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['truncation', 'BSR']
    """
    check_arguments(trade_off_figure, locals())
    if not methods:
        raise ValueError("`methods` must have at least one method, got none")
    for name, points in methods.items():
        for size, scores in points.items():
            if not scores or not all(map(isfinite, [size, *scores])):
                raise ValueError(f"`methods[{name!r}]` must have finite scores for every size, got {size}: {scores}")
        if not points:
            raise ValueError(f"`methods[{name!r}]` must have at least one size, got none")
    figure = empty_figure(width=7.2, height=4.4, title=title)
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    for (name, points), colour in zip(methods.items(), cycle(COLOURS), strict=False):
        sizes = sorted(points)
        means = [float(torch.tensor(points[size]).mean()) for size in sizes]
        axes.plot(sizes, means, color=colour, linewidth=2.0, label=name, zorder=2)
        across = [size for size in sizes for _ in points[size]]
        up = [score for size in sizes for score in points[size]]
        axes.scatter(across, up, color=colour, s=18, alpha=0.6, linewidths=0, zorder=3)
    style_axes(axes, xlabel, ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))  # sizes may be fractions
    if reference is not None:
        axes.axhline(reference[1], color=MUTED, linewidth=1.1, linestyle=(0, (5, 4)), zorder=1)
        axes.annotate(
            f"{reference[0]}: {reference[1]:.3f}",
            (1.0, reference[1]),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 5),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=MUTED,
        )
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    return figure
