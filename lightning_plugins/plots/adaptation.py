"""Figures of meta-learning: how tasks adapt step by step, and which gains were learned."""

import math
from collections.abc import Mapping
from itertools import cycle
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_plugins._arguments import check_arguments
from lightning_plugins.plots.style import COLOURS, INK, MUTED, empty_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def adaptation_figure(
    curves: Mapping[str, tuple[Tensor, Tensor]],
    *,
    ylabel: str = "query loss",
    trained_steps: int | None = None,
    log: bool = False,
    title: str | None = None,
) -> "Figure":
    """Draw a value after every inner step, one line with its interval per method.

    Args:
        curves: Mean and half-width of the interval by method name, tensors of shape ``(steps + 1,)`` each, as computed
            by `lightning_plugins.metrics.AdaptationCurve`; the numbers of steps may differ. NaN half-widths are not
            drawn.
        ylabel: Label of the value.
        trained_steps: Number of inner steps in training, marked by a dashed line.
        log: Whether its axis is logarithmic.
        title: Title of the figure.

    Returns:
        A figure with an Agg canvas; ``figure.savefig("adaptation.png")`` writes it. The legend gives every method's
        last value.

    Raises:
        TypeError: If a curve is not a pair.
        ValueError: If there is no curve, or one is not of two tensors of the same shape ``(steps + 1,)``, the first of
            them finite.
        ImportError: If matplotlib is missing.

    Example:
        >>> curves = {"MAML": (torch.tensor([4.0, 2.0, 1.5]), torch.tensor([0.3, 0.2, 0.1]))}
        >>> figure = adaptation_figure(curves, ylabel="mean squared error")
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['MAML: 1.5 ± 0.1']
    """
    check_arguments(adaptation_figure, locals())
    if not curves:
        raise ValueError("`curves` must have at least one curve, got none")
    checked = {name: _checked_curve(name, curve) for name, curve in curves.items()}
    figure = empty_figure(width=7.2, height=4.4, title=title)
    axes = figure.subplots()
    for (name, (mean, half)), colour in zip(checked.items(), cycle(COLOURS), strict=False):
        steps = range(len(mean))
        last = f" ± {half[-1]:.3g}" if math.isfinite(half[-1]) else ""
        alone = "o" if len(mean) == 1 else None  # a line through one point would be invisible
        axes.plot(steps, mean, color=colour, linewidth=2.0, label=f"{name}: {mean[-1]:.3g}{last}", marker=alone)
        low, high = (
            [m + sign * h if math.isfinite(h) else m for m, h in zip(mean, half, strict=True)] for sign in (-1, 1)
        )
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    style_axes(axes, "inner steps", ylabel)
    if log:
        axes.set_yscale("log")
    if trained_steps is not None:
        axes.axvline(trained_steps, color=MUTED, linewidth=1.1, linestyle=(0, (5, 4)), zorder=1)
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    return figure


def gains_figure(gains: Mapping[str, Tensor], *, title: str | None = None) -> "Figure":
    """Draw the learned gains of every layer over the index of the singular value, the largest first.

    Args:
        gains: Gains by layer name, of shape ``(r,)``, or ``(steps, r)``, one line per step, as returned by
            `lightning_plugins.mixins.GAPMixin.gains`.
        title: Title of the figure.

    Returns:
        A figure with an Agg canvas; a dashed line marks the gain 1, which corresponds to MAML.

    Raises:
        ValueError: If there is no layer, or gains are not finite and of these shapes.
        ImportError: If matplotlib is missing.

    Example:
        >>> figure = gains_figure({"conv1": torch.tensor([0.9, 1.1, 1.4]), "conv2": torch.tensor([1.2, 1.0])})
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['conv1', 'conv2']
    """
    check_arguments(gains_figure, locals())
    if not gains:
        raise ValueError("`gains` must have at least one layer, got none")
    figure = empty_figure(width=7.2, height=4.4, title=title)
    axes = figure.subplots()
    axes.axhline(1.0, color=MUTED, linewidth=1.1, linestyle=(0, (5, 4)), zorder=1)
    for (layer, values), colour in zip(gains.items(), cycle(COLOURS), strict=False):
        if values.ndim not in {1, 2} or not values.numel() or not bool(torch.isfinite(values).all()):
            raise ValueError(
                f"`gains[{layer!r}]` must be finite and of shape (r,) or (steps, r), got shape {tuple(values.shape)}"
            )
        rows = values.detach().cpu().double().reshape(-1, values.shape[-1])
        for step, row in enumerate(rows.tolist()):
            label = layer if len(rows) == 1 else f"{layer}, step {step + 1}"
            fading = 1.0 - 0.7 * (len(rows) - 1 - step) / len(rows)
            axes.plot(
                range(1, len(row) + 1), row, color=colour, alpha=fading, linewidth=1.6, marker="o", ms=3, label=label
            )
    style_axes(axes, "number of the singular value", "gain")
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    return figure


def _checked_curve(name: str, curve: tuple[Tensor, Tensor]) -> tuple[list[float], list[float]]:
    if not isinstance(curve, tuple | list) or len(curve) != 2:
        raise TypeError(
            f"`curves[{name!r}]` must be a pair of tensors, mean and half-width, got {type(curve).__name__}"
        )
    mean, half = (torch.as_tensor(part).detach().cpu().double() for part in curve)
    if mean.ndim != 1 or mean.shape != half.shape or not len(mean) or not bool(torch.isfinite(mean).all()):
        raise ValueError(
            f"`curves[{name!r}]` must be a finite mean and a half-width of shape (steps + 1,), got shapes"
            f" {tuple(mean.shape)} and {tuple(half.shape)}"
        )
    return mean.tolist(), half.tolist()
