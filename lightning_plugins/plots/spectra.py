"""Figures of representations: spectra over training, and of several runs."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_plugins._arguments import check_arguments
from lightning_plugins.plots.style import COLOURS, INK, MUTED, colour_by_step, empty_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import ColorType

_DECADES = 8  # eigenvalues this many powers of ten below the largest are omitted as rounding errors


def spectrum_figure(spectra: Sequence[Tensor], steps: Sequence[int], *, title: str | None = None) -> "Figure":
    """Draw an eigenvalue spectrum and its entropy over training.

    On the left one line per spectrum, coloured by its step, the latest drawn thicker; a dashed line marks the flat
    spectrum ``1/d``. On the right the von Neumann entropy over the steps, with its bound ``log(d)``.

    Args:
        spectra: One tensor of shape ``(d,)`` each, the eigenvalues of an autocorrelation matrix, in any order.
        steps: The training step of each spectrum.
        title: Title of the figure, such as the layer's name.

    Returns:
        A figure with an Agg canvas; ``figure.savefig("spectrum.png")`` writes it.

    Raises:
        ValueError: If there is no spectrum, the number of ``steps`` differs, or spectra are not 1-D, finite and of
            equal length.
        ImportError: If matplotlib is missing.

    Example:
        >>> spectra = [torch.tensor([0.9, 0.1, 0.0]), torch.tensor([0.5, 0.3, 0.2])]
        >>> figure = spectrum_figure(spectra, steps=[0, 100], title="backbone.fc:input")
        >>> [axes.get_xlabel() for axes in figure.axes[:2]]
        ['eigenvalue number', 'training step']
    """
    check_arguments(spectrum_figure, locals())
    sorted_spectra = [_checked(f"spectra[{index}]", spectrum) for index, spectrum in enumerate(spectra)]
    if not sorted_spectra:
        raise ValueError("`spectra` must have at least one spectrum, got none")
    if len(steps) != len(sorted_spectra):
        raise ValueError(f"`steps` must have one step per spectrum, {len(sorted_spectra)}, got {len(steps)}")
    if len(lengths := {len(spectrum) for spectrum in sorted_spectra}) > 1:
        raise ValueError(f"`spectra` must all have the same length, got {sorted(lengths)}")

    figure = empty_figure(width=10.0, height=4.2, title=title)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    shades = colour_by_step(left, steps)
    for spectrum, shade in zip(sorted_spectra, shades, strict=True):
        _draw_spectrum(left, spectrum, color=shade, width=1.1)
    _draw_spectrum(left, sorted_spectra[-1], color=shades[-1], width=2.4)
    _style_spectrum_axes(left, sorted_spectra)
    entropies = [float(torch.special.entr(spectrum).sum()) for spectrum in sorted_spectra]
    right.plot(steps, entropies, color=MUTED, linewidth=1.2, zorder=1)
    right.scatter(steps, entropies, c=shades, s=26, zorder=2)
    _style_entropy_axes(right, len(sorted_spectra[0]))
    return figure


def spectrum_comparison_figure(spectra: Mapping[str, Tensor], *, title: str | None = None) -> "Figure":
    """Draw the eigenvalue spectra of several runs or layers on one pair of axes.

    Args:
        spectra: Eigenvalues by run name, of shape ``(d,)``, in any order; ``d`` may differ.
        title: Title of the figure.

    Returns:
        A figure with an Agg canvas. The legend gives each run's effective rank, ``exp`` of the entropy.

    Raises:
        ValueError: If there is no spectrum, or one is not 1-D and finite.
        ImportError: If matplotlib is missing.

    Example:
        >>> runs = {"without": torch.tensor([0.9, 0.1]), "with VNE": torch.tensor([0.5, 0.5])}
        >>> figure = spectrum_comparison_figure(runs)
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['without: effective rank 1.4', 'with VNE: effective rank 2.0']
    """
    check_arguments(spectrum_comparison_figure, locals())
    if not spectra:
        raise ValueError("`spectra` must have at least one spectrum, got none")
    sorted_spectra = {name: _checked(f"spectra[{name!r}]", spectrum) for name, spectrum in spectra.items()}
    figure = empty_figure(width=7.2, height=4.4, title=title)
    axes = figure.subplots()
    for (name, spectrum), colour in zip(sorted_spectra.items(), cycle(COLOURS), strict=False):
        effective_rank = float(torch.special.entr(spectrum).sum().exp())
        label = f"{name}: effective rank {effective_rank:.1f}"
        _draw_spectrum(axes, spectrum, color=colour, width=2.0, label=label)
    _style_spectrum_axes(axes, list(sorted_spectra.values()))
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    return figure


def _checked(name: str, spectrum: Tensor) -> Tensor:
    if spectrum.ndim != 1 or not len(spectrum) or not torch.isfinite(spectrum).all():
        raise ValueError(f"`{name}` must be finite eigenvalues of shape (d,), got shape {tuple(spectrum.shape)}")
    return spectrum.detach().cpu().double().clamp_min(0.0).sort(descending=True).values


def _draw_spectrum(
    axes: "Axes", spectrum: Tensor, *, color: "ColorType", width: float, label: str | None = None
) -> None:
    shown = spectrum[spectrum > spectrum[0] * 10.0**-_DECADES].tolist()
    alone = "o" if len(shown) == 1 else None  # a line through one point would be invisible
    axes.plot(range(1, len(shown) + 1), shown, color=color, linewidth=width, label=label, marker=alone, clip_on=False)


def _style_spectrum_axes(axes: "Axes", spectra: Sequence[Tensor]) -> None:
    style_axes(axes, "eigenvalue number", "eigenvalue of the autocorrelation")
    axes.set_yscale("log")
    longest = max(map(len, spectra))
    axes.set_xlim(1, max(longest, 2))
    for length in sorted({len(spectrum) for spectrum in spectra}):
        flat = 1 / length
        axes.plot([1, length], [flat, flat], color=MUTED, linewidth=1.1, linestyle=(0, (5, 4)), zorder=1)
        _label_reference(axes, f"flat: 1/{length}", (length, flat), across="data")


def _style_entropy_axes(axes: "Axes", length: int) -> None:
    style_axes(axes, "training step", "von Neumann entropy (nats)")
    bound = math.log(length)
    axes.axhline(bound, color=MUTED, linewidth=1.1, linestyle=(0, (5, 4)), zorder=1)
    axes.set_ylim(0.0, 1.12 * bound if length > 1 else 1.0)
    _label_reference(axes, f"bound: log {length} = {bound:.2f}", (1.0, bound), across="axes fraction")


def _label_reference(
    axes: "Axes", text: str, place: tuple[float, float], across: Literal["data", "axes fraction"]
) -> None:
    axes.annotate(
        text,
        place,
        xycoords=(across, "data"),
        xytext=(-4, 5),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=MUTED,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},  # grid lines stop at the labels
        zorder=3,
    )
