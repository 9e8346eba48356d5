"""Figures of ranks: the fraction kept of each layer, and the trade-off of a search between score and size."""

from collections.abc import Mapping
from itertools import cycle
from typing import TYPE_CHECKING

from lightning_plugins._arguments import check_arguments
from lightning_plugins.compression import RankSearch
from lightning_plugins.plots.style import COLOURS, GRID, INK, MUTED, empty_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

_HEIGHT = 0.26  # inches per layer


def rank_figure(
    searches: Mapping[str, RankSearch], full_ranks: Mapping[str, int] | None = None, *, title: str | None = None
) -> "Figure":
    """Draw the ranks chosen for every layer, and score against removed fraction over the search.

    On the left a row per layer with a mark per choice, and a bar up to the layer's full rank. On the right the best
    score at every level of a search, up to its result; choices without a search have no score and are drawn as a line
    at their removed fraction.

    Args:
        searches: Results to compare, by name: of `beam_search`, `equal_ratio` and similar functions for the same
            layers.
        full_ranks: Full rank of every layer, such as ``{name: cost.full_rank for name, cost in
            layer_costs(model).items()}``; without it no bars are drawn.
        title: Title of the figure.

    Returns:
        A figure with an Agg canvas; ``figure.savefig("ranks.png")`` writes it.

    Raises:
        ValueError: If there is nothing to draw, or the layers are not the same.
        ImportError: If matplotlib is missing.

    Example:
        >>> from torch import nn
        >>> from lightning_plugins.compression import energy_threshold, equal_ratio
        >>> net = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
        >>> chosen = {rule.__name__: rule(net, budget=0.5) for rule in (equal_ratio, energy_threshold)}
        >>> figure = rank_figure(chosen, {"0": 20, "1": 10}, title="half of the weights")
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['rank', 'removed fraction']
    """
    check_arguments(rank_figure, locals())
    if not searches:
        raise ValueError("`searches` must have at least one result, got none")
    names = list(next(iter(searches.values())).ranks)
    for name, search in searches.items():
        if list(search.ranks) != names:
            raise ValueError(f"`searches` must all be for the same layers, got others for {name!r}")
    if full_ranks is not None and (missing := [name for name in names if name not in full_ranks]):
        raise ValueError(f"`full_ranks` must have the full rank of every layer, got none for {missing[0]!r}")
    figure = empty_figure(width=10.0, height=max(3.6, 1.3 + _HEIGHT * len(names)), title=title)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_ranks(left, searches, names, full_ranks)
    _draw_search(right, searches)
    left.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right")
    return figure


def _draw_ranks(
    axes: "Axes", searches: Mapping[str, RankSearch], names: list[str], full_ranks: Mapping[str, int] | None
) -> None:
    rows = list(range(len(names)))
    if full_ranks is not None:
        axes.barh(rows, [full_ranks[name] for name in names], height=0.62, color=GRID, label="full rank", zorder=1)
    for (name, search), colour in zip(searches.items(), cycle(COLOURS), strict=False):
        ranks = [search.ranks[layer] for layer in names]
        axes.scatter(ranks, rows, s=26, color=colour, label=f"{name}: {1 - search.share:.1%} removed", zorder=2)
    style_axes(axes, "rank", "")
    axes.set_yticks(rows, names)
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first layer on top
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)


def _draw_search(axes: "Axes", searches: Mapping[str, RankSearch]) -> None:
    style_axes(axes, "removed fraction", "score, truncated without fine-tuning")
    for search, colour in zip(searches.values(), cycle(COLOURS), strict=False):
        removed = 1 - search.share
        if search.trace and search.score is not None:
            levels = [(1 - level.share, level.score) for level in search.trace[:-1]] + [(removed, search.score)]
            axes.plot(*zip(*levels, strict=True), color=colour, linewidth=1.8)
            axes.scatter([removed], [search.score], s=32, color=colour, zorder=3)
        else:
            axes.axvline(removed, color=colour, linewidth=1.1, linestyle=(0, (5, 4)))
    if not any(search.trace for search in searches.values()):
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no search among them", transform=axes.transAxes, ha="center", color=MUTED, fontsize=9)
    axes.xaxis.set_major_locator(_few_ticks())


def _few_ticks() -> "MaxNLocator":
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=6)
