"""Figures of mutual information: estimates against true values, with their upper limits."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from lightning_plugins._arguments import check_arguments
from lightning_plugins.plots.style import COLOURS, INK, MUTED, empty_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^vP*"


def information_figure(
    truths: Sequence[float],
    estimates: Mapping[str, Sequence[tuple[float, float]]],
    *,
    ceilings: Mapping[str, float] | None = None,
    units: str = "bits",
    xlabel: str | None = None,
    title: str | None = None,
) -> "Figure":
    """Draw estimates of mutual information over the true values, with errors and upper limits.

    Args:
        truths: The true value, or any other number, of each setting.
        estimates: Value and standard error in each setting, by estimator name; NaN errors are not drawn.
        ceilings: Upper limits of estimates by name, such as ``ln K``; drawn as dashed lines.
        units: Units of all values, for the labels.
        xlabel: Label of ``truths``; None for the true information, with a diagonal on which estimates should lie.
        title: Title of the figure.

    Returns:
        A figure with an Agg canvas.

    Raises:
        ValueError: If there is no setting or no estimator, or one lacks a value for a setting.
        ImportError: If matplotlib is missing.

    Example:
        >>> figure = information_figure([2.0, 4.0], {"InfoNCE": [(1.9, 0.1), (3.1, 0.1)]}, ceilings={"ln K": 3.2})
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['truth', 'ln K', 'InfoNCE']
    """
    check_arguments(information_figure, locals())
    truths = [float(truth) for truth in truths]
    if not truths or not estimates:
        raise ValueError(
            f"`truths` and `estimates` must have at least one entry, got {len(truths)} and {len(estimates)}"
        )
    for name, values in estimates.items():
        if len(values) != len(truths):
            raise ValueError(
                f"`estimates[{name!r}]` must have a value and an error for each of {len(truths)} `truths`, got "
                f"{len(values)}"
            )
    figure = empty_figure(width=7.2, height=4.6, title=title)
    axes = figure.subplots()
    if xlabel is None:
        axes.plot([0, max(truths)], [0, max(truths)], color=INK, linewidth=1.2, label="truth", zorder=1)
    for (name, ceiling), pattern in zip((ceilings or {}).items(), cycle([(5, 4), (1, 2), (6, 2, 1, 2)]), strict=False):
        axes.axhline(ceiling, color=MUTED, linewidth=1.1, linestyle=(0, pattern), label=name, zorder=1)
    for (name, values), colour, marker in zip(estimates.items(), cycle(COLOURS), cycle(_MARKERS), strict=False):
        errors = [error if math.isfinite(error) else 0.0 for _, error in values]
        heights = [value for value, _ in values]
        axes.errorbar(
            truths, heights, yerr=errors, color=colour, marker=marker, ms=5, linewidth=1.6, capsize=2, label=name
        )
    style_axes(axes, xlabel or f"true mutual information [{units}]", f"estimate [{units}]")
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    return figure
