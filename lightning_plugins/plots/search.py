"""Figures of searches: regret against trials, and the success of arms and mutations."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_plugins._arguments import check_arguments
from lightning_plugins.plots.style import COLOURS, INK, MUTED, empty_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def regret_figure(
    methods: Mapping[str, Sequence[Sequence[float]]], *, ylabel: str = "regret", title: str | None = None
) -> "Figure":
    """Draw regret against the number of trials for several methods: median and interquartile range over searches.

    Args:
        methods: Searches by method name: for each, the regret of the best trial so far after every trial.
        ylabel: Label of the vertical axis, which is logarithmic if all medians are positive.
        title: Title of the figure.

    Returns:
        A figure with an Agg canvas; ``figure.savefig("regret.png")`` writes it.

    Raises:
        ValueError: If there is no method, a method has no search, searches differ in length, or a number is not finite.
        ImportError: If matplotlib is missing.

    Example:
        >>> figure = regret_figure({"random": [[3.0, 2.0], [4.0, 1.0]], "B2EA": [[2.0, 0.5]]})
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['random', 'B2EA']
    """
    check_arguments(regret_figure, locals())
    if not methods:
        raise ValueError("`methods` must have at least one method, got none")
    for name, searches in methods.items():
        if not searches or not all(map(len, searches)) or len({len(search) for search in searches}) != 1:
            raise ValueError(f"`methods[{name!r}]` must have searches of one length, got {[*map(len, searches)]}")
        if not all(isfinite(value) for search in searches for value in search):
            raise ValueError(f"`methods[{name!r}]` must have finite numbers")
    figure = empty_figure(width=7.2, height=4.4, title=title)
    axes = figure.subplots()
    positive = True
    for (name, searches), colour in zip(methods.items(), cycle(COLOURS), strict=False):
        array = np.asarray(searches, dtype=float)
        low, middle, high = np.quantile(array, [0.25, 0.5, 0.75], axis=0)
        trials = np.arange(1, array.shape[1] + 1)
        axes.fill_between(trials, low, high, color=colour, alpha=0.15, linewidth=0, zorder=1)
        axes.plot(trials, middle, color=colour, linewidth=2.0, label=name, zorder=2)
        positive = positive and bool((middle > 0).all())
    style_axes(axes, "trials", ylabel)
    if positive:
        axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    return figure


def arms_figure(
    origins: Sequence[Mapping[str, Any]], *, direction: str = "minimize", title: str | None = None
) -> "Figure":
    """Draw how often each arm chose a trial, how often that trial was the best so far, and the same for mutations.

    Args:
        origins: As `lightning_plugins.search.origins` returns them, in the order of the trials.
        direction: ``"minimize"`` or ``"maximize"``.
        title: Title of the figure.

    Returns:
        A figure with an Agg canvas.

    Raises:
        ValueError: If there is no trial.
        ImportError: If matplotlib is missing.

    Example:
        >>> rows = [{"number": 2, "value": 1.0, "arms": ["gp+ei", "forest+pi"], "mutated": True}]
        >>> len(arms_figure(rows).axes[0].patches)
        4
    """
    check_arguments(arms_figure, locals())
    if not origins:
        raise ValueError("`origins` must have at least one trial, got none")
    sign = -1.0 if direction == "maximize" else 1.0
    chosen, won = Counter[str](), Counter[str]()
    best = float("inf")
    for row in origins:
        names = (row["arms"][1], "mutated" if row["mutated"] else "as ranked")
        chosen.update(names)
        value = row["value"]
        if value is not None and sign * value < best:
            best = sign * value
            won.update(names)
    figure = empty_figure(width=7.2, height=4.4, title=title)
    axes = figure.subplots()
    labels = sorted(chosen, key=lambda name: (name in {"mutated", "as ranked"}, name))
    places = np.arange(len(labels))
    axes.bar(places, [chosen[name] for name in labels], color=MUTED, width=0.6, label="trials chosen")
    axes.bar(places, [won[name] for name in labels], color=COLOURS[0], width=0.6, label="best so far")
    style_axes(axes, "", "trials")
    axes.set_xticks(places, labels, rotation=20)
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    return figure
