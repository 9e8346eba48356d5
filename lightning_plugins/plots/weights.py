"""Figures of weights: singular values over training, and of all layers of a network."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_plugins._arguments import check_arguments
from lightning_plugins.functional.weight_spectrum import summarize_spectrum
from lightning_plugins.plots.style import COLOURS, INK, MUTED, colour_by_step, empty_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import ColorType

_DECADES = 6  # singular values this many powers of ten below the largest are omitted
_ROW = 0.22  # inches per layer


def weight_spectrum_figure(spectra: Sequence[Tensor], steps: Sequence[int], *, title: str | None = None) -> "Figure":
    """Draw the singular values of a weight over training.

    On the left one line per spectrum, coloured by its step, the latest drawn thicker. On the right, over the steps, the
    stable rank and the effective rank above, the spectral norm below.

    Args:
        spectra: One tensor of shape ``(n,)`` each, the singular values of a matrix, in any order.
        steps: The training step of each spectrum.
        title: Title of the figure, such as the layer's name.

    Returns:
        A figure with an Agg canvas; ``figure.savefig("spectrum.png")`` writes it.

    Raises:
        ValueError: If there is no spectrum, the number of ``steps`` differs, or a spectrum is not 1-D and finite.
        ImportError: If matplotlib is missing.

    Example:
        >>> spectra = [torch.tensor([3.0, 2.0, 1.0]), torch.tensor([3.0, 0.5, 0.1])]
        >>> figure = weight_spectrum_figure(spectra, steps=[0, 100], title="backbone.fc")
        >>> [axes.get_ylabel() for axes in figure.axes[:3]]
        ['singular value', 'rank', 'spectral norm']
    """
    check_arguments(weight_spectrum_figure, locals())
    values = [_checked(f"spectra[{index}]", spectrum) for index, spectrum in enumerate(spectra)]
    if not values:
        raise ValueError("`spectra` must have at least one spectrum, got none")
    if len(steps) != len(values):
        raise ValueError(f"`steps` must have one step per spectrum, {len(values)}, got {len(steps)}")
    figure = empty_figure(width=10.0, height=4.6, title=title)
    places = figure.subplot_mosaic([["spectrum", "ranks"], ["spectrum", "norm"]], width_ratios=(3, 2))
    left, ranks, norm = places["spectrum"], places["ranks"], places["norm"]
    shades = colour_by_step(left, steps)
    for spectrum, shade in zip(values, shades, strict=True):
        _draw_values(left, spectrum, color=shade, width=1.1)
    _draw_values(left, values[-1], color=shades[-1], width=2.4)
    style_axes(left, "number of the singular value", "singular value")
    left.set_yscale("log")
    left.set_xlim(1, max(2, *map(len, values)))
    _draw_numbers(ranks, norm, steps, values)
    return figure


def layer_spectra_figure(spectra: Mapping[str, Tensor], *, title: str | None = None) -> "Figure":
    """Draw the ranks of a network's weights relative to full rank, layer by layer.

    On the left a bar per layer, the first one on top: its stable rank within its effective rank, both relative to the
    full rank. On the right the singular values of every layer, relative to the largest, over their index relative to
    the full rank, coloured from the first layer to the last.

    Args:
        spectra: Singular values by layer, of shape ``(n,)``, in any order.
        title: Title of the figure.

    Returns:
        A figure with an Agg canvas.

    Raises:
        ValueError: If there is no layer, or one's values are not 1-D and finite.
        ImportError: If matplotlib is missing.

    Example:
        >>> figure = layer_spectra_figure({"fc1": torch.tensor([2.0, 1.0]), "fc2": torch.tensor([1.0, 1.0])})
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['fc1', 'fc2']
    """
    check_arguments(layer_spectra_figure, locals())
    from matplotlib.ticker import MaxNLocator

    if not spectra:
        raise ValueError("`spectra` must have at least one layer, got none")
    values = {name: _checked(f"spectra[{name!r}]", spectrum) for name, spectrum in spectra.items()}
    figure = empty_figure(width=11.0, height=max(4.0, 1.2 + _ROW * len(values)), title=title)
    left, right = figure.subplots(1, 2)
    summaries = [summarize_spectrum(spectrum) for spectrum in values.values()]
    full = [len(spectrum) for spectrum in values.values()]
    rows = range(len(values))
    effective = [summary.effective_rank / n for summary, n in zip(summaries, full, strict=True)]
    stable = [summary.stable_rank / n for summary, n in zip(summaries, full, strict=True)]
    left.barh(rows, effective, color=COLOURS[4], height=0.75, label="effective rank")
    left.barh(rows, stable, color=COLOURS[0], height=0.45, label="stable rank")
    style_axes(left, "share of the full rank", "")
    left.set_yticks(list(rows), list(values), fontsize=8)
    left.invert_yaxis()
    left.set_xlim(0, 1)
    left.xaxis.set_major_locator(MaxNLocator(nbins=6))  # shares, not numbers
    left.grid(visible=False, axis="y")
    left.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    left.margins(y=0.02)
    left.set_ylim(len(values) - 0.4, -1.6)  # room for the legend
    _draw_shares(right, list(values.values()))
    return figure


def _checked(name: str, spectrum: Tensor) -> Tensor:
    if spectrum.ndim != 1 or not len(spectrum) or not torch.isfinite(spectrum).all():
        raise ValueError(f"`{name}` must be finite singular values of shape (n,), got shape {tuple(spectrum.shape)}")
    return spectrum.detach().cpu().double().clamp_min(0.0).sort(descending=True).values


def _draw_values(axes: "Axes", spectrum: Tensor, *, color: "ColorType", width: float) -> None:
    shown = spectrum[spectrum > spectrum[0] * 10.0**-_DECADES].tolist()
    alone = "o" if len(shown) == 1 else None  # a line through one point would be invisible
    axes.plot(range(1, len(shown) + 1), shown, color=color, linewidth=width, marker=alone, clip_on=False)


def _draw_numbers(ranks: "Axes", norm: "Axes", steps: Sequence[int], values: Sequence[Tensor]) -> None:
    summaries = [summarize_spectrum(spectrum) for spectrum in values]
    for name, colour in (("effective_rank", COLOURS[4]), ("stable_rank", COLOURS[0])):
        numbers = [getattr(summary, name) for summary in summaries]
        ranks.plot(
            steps, numbers, color=colour, linewidth=1.8, marker="o", markersize=3.5, label=name.replace("_", " ")
        )
    style_axes(ranks, "", "rank")
    ranks.set_ylim(bottom=0)
    ranks.tick_params(labelbottom=False)
    ranks.legend(frameon=False, fontsize=9, labelcolor=INK)
    norm.plot(steps, [summary.spectral_norm for summary in summaries], color=MUTED, linewidth=1.8, marker="o", ms=3.5)
    style_axes(norm, "training step", "spectral norm")
    norm.set_ylim(bottom=0)
    norm.sharex(ranks)


def _draw_shares(axes: "Axes", values: Sequence[Tensor]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    shades = colormaps["viridis"](torch.linspace(0.0, 0.88, len(values)).numpy())
    for spectrum, shade in zip(values, shades, strict=True):
        shares = spectrum / spectrum[0].masked_fill(spectrum[0] == 0, 1)
        shown = shares[shares > 10.0**-_DECADES].tolist()
        places = [(number + 1) / len(spectrum) for number in range(len(shown))]
        alone = "o" if len(shown) == 1 else None
        axes.plot(places, shown, color=tuple(shade), linewidth=1.1, marker=alone)
    style_axes(axes, "number of the singular value, share of the full rank", "share of the largest singular value")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))  # shares, not numbers
    axes.set_yscale("log")
    axes.set_xlim(0, 1)
