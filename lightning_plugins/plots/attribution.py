"""Figures of attributions: maps over signals and images, and curves of degradation."""

from collections.abc import Mapping
from itertools import cycle
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_plugins._arguments import check_arguments
from lightning_plugins.functional.tensors import check_floating
from lightning_plugins.plots.style import COLOURS, INK, MUTED, empty_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Mapping[str, tuple[Tensor, Tensor]]


def attribution_figure(
    inputs: Tensor, maps: Mapping[str, Tensor], *, mask: Tensor | None = None, title: str | None = None
) -> "Figure":
    """Draw one sample with the maps of several methods, and the true positions.

    A signal is coloured by each map in a separate row, with true spans shaded. For an image each map is shown next to
    it, with the true region outlined.

    Args:
        inputs: A signal ``([C,] L)``, whose first channel is drawn, or an image ``(C, H, W)``.
        maps: Maps over the same positions by method name, with or without channels, which are summed.
        mask: True positions, ``(L,)`` or ``(H, W)``, with or without a channel of one.
        title: Title of the figure.

    Returns:
        A figure with an Agg canvas.

    Raises:
        ValueError: If there is no map, or shapes do not go together.
        ImportError: If matplotlib is missing.

    Example:
        >>> signal = torch.sin(torch.arange(64.0) / 5)
        >>> figure = attribution_figure(signal, {"input": signal}, mask=torch.arange(64) > 40)
        >>> figure.axes[0].get_ylabel()
        'input'
    """
    check_arguments(attribution_figure, locals())
    check_floating("inputs", inputs)
    if not maps:
        raise ValueError("`maps` must have at least one map, got none")
    if not bool(inputs.isfinite().all()):
        raise ValueError("`inputs` must be finite, got NaN or infinity")
    if inputs.ndim not in {1, 2, 3}:
        raise ValueError(f"`inputs` must be a signal ([C,] L) or an image (C, H, W), got {tuple(inputs.shape)}")
    spatial = tuple(inputs.shape[-2:] if inputs.ndim == 3 else inputs.shape[-1:])
    flat = {name: _summed(f"maps[{name!r}]", value, spatial) for name, value in maps.items()}
    truth = None if mask is None else _summed("mask", mask.float(), spatial) > 0
    return _over_image(inputs, flat, truth, title) if len(spatial) == 2 else _over_signal(inputs, flat, truth, title)


def degradation_figure(curves: Curves, *, title: str | None = None) -> "Figure":
    """Draw the class probability as patches are removed, least (dashed) and most relevant ones first.

    Args:
        curves: Scaled curves ``(steps + 1,)``, or ``(classes, steps + 1)``, whose mean is drawn, by method name: least,
            then most relevant patches first. See `DegradationScore.scaled_curves`.
        title: Title of the figure.

    Returns:
        A figure with an Agg canvas; the legend gives the area between the two curves of each method.

    Raises:
        ValueError: If there is no curve, or the two of a method differ in shape.
        ImportError: If matplotlib is missing.

    Example:
        >>> figure = degradation_figure({"gradcam": (torch.tensor([1.0, 0.9, 0.0]), torch.tensor([1.0, 0.3, 0.0]))})
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['gradcam: +0.20']
    """
    check_arguments(degradation_figure, locals())
    if not curves:
        raise ValueError("`curves` must have at least one method, got none")
    figure = empty_figure(width=7.2, height=4.8, title=title)
    axes = figure.subplots()
    for (name, pair), colour in zip(curves.items(), cycle(COLOURS), strict=False):
        least, most = (part.detach().cpu().double().reshape(-1, part.shape[-1]).nanmean(0) for part in pair)
        if least.shape != most.shape:
            raise ValueError(f"`curves[{name!r}]` must be of one shape, got {tuple(least.shape)}, {tuple(most.shape)}")
        steps = torch.linspace(0, 100, len(most)).tolist()
        axes.plot(steps, most.tolist(), color=colour, linewidth=1.6, label=f"{name}: {(least - most).mean():+.2f}")
        axes.plot(steps, least.tolist(), color=colour, linewidth=1.2, linestyle=(0, (4, 3)))
    style_axes(axes, "% of patches replaced", "scaled probability")
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, ncols=2 if len(curves) > 8 else 1)
    return figure


def _over_signal(inputs: Tensor, maps: Mapping[str, Tensor], truth: Tensor | None, title: str | None) -> "Figure":
    from matplotlib.collections import LineCollection

    signal = inputs.reshape(-1, inputs.shape[-1])[0].detach().cpu().double()
    figure = empty_figure(width=8.0, height=0.9 + 1.15 * len(maps), title=title)
    rows = figure.subplots(len(maps), 1, sharex=True, squeeze=False)[:, 0]
    points = torch.stack([torch.arange(len(signal)).double(), signal], 1)
    segments = torch.stack([points[:-1], points[1:]], 1).numpy()
    for axes, (name, values) in zip(rows, maps.items(), strict=True):
        if truth is not None:
            for begin, end in _runs(truth):
                axes.axvspan(begin, end, color="#f3e3c7", linewidth=0, zorder=0)
        lines = LineCollection(list(segments), cmap="coolwarm", norm=_symmetric(values), linewidths=1.6)
        lines.set_array(values[:-1].numpy())
        axes.add_collection(lines)
        axes.set_xlim(0, len(signal))
        axes.set_ylim(float(signal.min()) - 0.1, float(signal.max()) + 0.1)
        style_axes(axes, "sample" if axes is rows[-1] else "", name)
        axes.set_yticks([])
        axes.yaxis.label.set(rotation=0, horizontalalignment="right", verticalalignment="center")
    return figure


def _over_image(inputs: Tensor, maps: Mapping[str, Tensor], truth: Tensor | None, title: str | None) -> "Figure":
    figure = empty_figure(width=1.9 * (len(maps) + 1), height=2.5, title=title)
    rows = figure.subplots(1, len(maps) + 1, squeeze=False)[0]
    picture = inputs.detach().cpu().float().mean(0)
    for axes, (name, values) in zip(rows, {"input": picture, **maps}.items(), strict=True):
        if name == "input":
            axes.imshow(values.numpy(), cmap="gray")
        else:
            axes.imshow(values.numpy(), cmap="coolwarm", norm=_symmetric(values))
        if truth is not None:
            axes.contour(truth.float().numpy(), levels=[0.5], colors=[INK], linewidths=1.0)
        _plain(axes, name)
    return figure


def _plain(axes: "Axes", name: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(name, fontsize=9, color=MUTED)


def _symmetric(values: Tensor) -> "object":
    from matplotlib.colors import Normalize

    largest = float(values.abs().max()) or 1.0
    return Normalize(-largest, largest)


def _runs(truth: Tensor) -> list[tuple[int, int]]:
    """First and one beyond the last position of each run of true values."""
    edges = torch.nn.functional.pad(truth.int(), (1, 1)).diff()
    begins, ends = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    return list(zip(begins, ends, strict=True))


def _summed(name: str, value: Tensor, spatial: tuple[int, ...]) -> Tensor:
    flat = value.detach().cpu().double()
    if flat.ndim == len(spatial) + 1:
        flat = flat.sum(0)
    if tuple(flat.shape) != spatial:
        raise ValueError(f"`{name}` must have the positions {spatial} of `inputs`, got shape {tuple(value.shape)}")
    return flat
