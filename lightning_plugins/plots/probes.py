"""Figures of probes: scores over network depth, and attention correlations by layer and head."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_plugins._arguments import check_arguments
from lightning_plugins._checks import check_finite_number
from lightning_plugins.plots.style import COLOURS, INK, MUTED, colour_by_step, empty_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INITIAL = "@initial"
_LONGEST = 14  # maximum number of characters of a layer name below the axis


def probe_profile_figure(
    profiles: Sequence[Mapping[str, float]],
    steps: Sequence[int],
    *,
    score: str = "held-out R²",
    lowest: float = -0.25,
    title: str | None = None,
) -> "Figure":
    """Draw a probe's score over the layers, one line per training step, with dashed controls.

    Args:
        profiles: Score by layer, for every step, in the order of the layers. ``<layer>@initial`` is a layer of the
            initial network; ``"projection"`` is drawn as a horizontal line.
        steps: The training step of each profile.
        score: Name of the score.
        lowest: Lower limit of the axis: a control may be far below 0 and would compress the rest.
        title: Title of the figure.

    Returns:
        A figure with an Agg canvas; ``figure.savefig("profile.png")`` writes it.

    Raises:
        ValueError: If there is no profile, no layer in one, or another number of steps.
        ImportError: If matplotlib is missing.

    Example:
        >>> figure = probe_profile_figure([{"layer.0": 0.6, "layer.1": 0.7, "layer.0@initial": 0.1}], steps=[0])
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['layer.0', 'layer.1']
    """
    check_arguments(probe_profile_figure, locals())
    check_finite_number("lowest", lowest)
    if not profiles or len(profiles) != len(steps):
        raise ValueError(f"`profiles` must have one entry per step, got {len(profiles)} and {len(steps)} `steps`")
    names = [name for name in profiles[-1] if not name.endswith(_INITIAL) and name != "projection"]
    if not names:
        raise ValueError("`profiles` must have at least one layer, got none")
    figure = empty_figure(width=max(6.4, 2.6 + 0.55 * len(names)), height=4.4, title=title)
    axes = figure.subplots()
    for profile, shade in zip(profiles, colour_by_step(axes, list(steps)), strict=True):
        known = [
            (place, profile[name]) for place, name in enumerate(names) if isfinite(profile.get(name, float("nan")))
        ]
        if known:
            axes.plot(*zip(*known, strict=True), color=shade, linewidth=2.0, marker="o", markersize=4)
    _draw_controls(axes, profiles[-1], names)
    style_axes(axes, "layer", score)
    axes.set_xticks(
        range(len(names)), [name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}" for name in names]
    )
    axes.tick_params(axis="x", labelrotation=0 if len(names) < 8 else 40)
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, lowest), top)
    axes.axhline(0.0, color=MUTED, linewidth=0.8, zorder=1)
    return figure


def _draw_controls(axes: "Axes", profile: Mapping[str, float], names: Sequence[str]) -> None:
    """The initial network and a random projection, as labelled dashed lines."""
    initial = [(p, profile[f"{name}{_INITIAL}"]) for p, name in enumerate(names) if f"{name}{_INITIAL}" in profile]
    dashed = (0, (5, 4))
    if initial:
        axes.plot(*zip(*initial, strict=True), color=COLOURS[1], linewidth=1.4, linestyle=dashed, label="as it began")
    if "projection" in profile:
        axes.axhline(
            profile["projection"],
            color=COLOURS[2],
            linewidth=1.4,
            linestyle=dashed,
            label="random projection of the input",
        )
    if initial or "projection" in profile:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def attention_heat_map_figure(
    correlations: Tensor, *, property_name: str = "property", title: str | None = None
) -> "Figure":
    """Draw the correlation of attention with a token's property by layer and head.

    Args:
        correlations: Shape ``(layers, heads)``, in ``[-1, 1]``; NaN stays blank.
        property_name: Name of the property, such as ``"IDF"``.
        title: Title of the figure.

    Returns:
        A figure with an Agg canvas.

    Raises:
        ValueError: If ``correlations`` are not a matrix.
        ImportError: If matplotlib is missing.

    Example:
        >>> import torch
        >>> figure = attention_heat_map_figure(torch.tensor([[0.5, -0.2], [0.1, 0.9]]), property_name="IDF")
        >>> figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()
        ('head', 'layer')
    """
    check_arguments(attention_heat_map_figure, locals())
    if correlations.ndim != 2 or not correlations.numel():
        raise ValueError(f"`correlations` must have shape (layers, heads), got {tuple(correlations.shape)}")
    layers, heads = correlations.shape
    figure = empty_figure(width=max(4.8, 1.8 + 0.45 * heads), height=max(2.6, 1.4 + 0.42 * layers), title=title)
    axes = figure.subplots()
    picture = axes.imshow(correlations.detach().cpu().float().numpy(), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    for layer in range(layers):
        for head in range(heads):
            value = float(correlations[layer, head])
            colour = "white" if abs(value) > 0.6 else INK
            axes.text(
                head, layer, f"{value:.2f}".replace("0.", "."), ha="center", va="center", fontsize=7, color=colour
            )
    axes.set_xlabel("head", color=INK, fontsize=10)
    axes.set_ylabel("layer", color=INK, fontsize=10)
    axes.set_xticks(range(heads))
    axes.set_yticks(range(layers))
    axes.tick_params(labelsize=9, colors=MUTED, length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(picture, ax=axes, pad=0.02)
    bar.set_label(f"rank correlation with {property_name}", color=INK, fontsize=9)
    bar.ax.tick_params(labelsize=8, colors=MUTED)
    bar.outline.set_visible(False)
    return figure
