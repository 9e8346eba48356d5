"""Figures of representations: spectra over training time, and of several runs side by side.

The figures are built without pyplot, so they are safe in threads, without a display and beside a user's own figures.
matplotlib is imported when one is drawn.
"""

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import cycle
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import ColorType

_INK, _MUTED, _GRID = "#222222", "#6b6b6b", "#e4e4e4"
# Okabe and Ito's colours, told apart by colour-blind readers too; the yellow is left out, too pale for a line on white
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DECADES = 8  # eigenvalues this many powers of ten below the largest are left out: rounding, and a squashed picture


def spectrum_figure(spectra: Sequence[Tensor], steps: Sequence[int], *, title: str | None = None) -> "Figure":
    """Draw how an eigenvalue spectrum and its entropy changed over training.

    On the left one line per spectrum, coloured by its step, the latest drawn thicker; a dashed line marks the flat
    spectrum ``1/d``. On the right the von Neumann entropy over the steps, below its bound ``log(d)``.

    Args:
        spectra: One tensor of shape ``(d,)`` each, the eigenvalues of an autocorrelation matrix, in any order.
        steps: The training step of each spectrum.
        title: What stands above the figure, such as the layer's name.

    Returns:
        A figure with an Agg canvas; ``figure.savefig("spectrum.png")`` writes it.

    Raises:
        ValueError: If there is no spectrum, the number of ``steps`` is another, or a spectrum is not 1-D, of the
            length of the others, and finite.
        ImportError: If matplotlib is missing.

    Example:
        >>> spectra = [torch.tensor([0.9, 0.1, 0.0]), torch.tensor([0.5, 0.3, 0.2])]
        >>> figure = spectrum_figure(spectra, steps=[0, 100], title="backbone.fc:input")
        >>> [axes.get_xlabel() for axes in figure.axes[:2]]
        ['eigenvalue number', 'training step']
    """
    sorted_spectra = [_checked(f"spectra[{index}]", spectrum) for index, spectrum in enumerate(spectra)]
    if not sorted_spectra:
        raise ValueError("`spectra` must have at least one spectrum, got none")
    if len(steps) != len(sorted_spectra):
        raise ValueError(f"`steps` must have one step per spectrum, {len(sorted_spectra)}, got {len(steps)}")
    if len(lengths := {len(spectrum) for spectrum in sorted_spectra}) > 1:
        raise ValueError(f"`spectra` must all have the same length, got {sorted(lengths)}")

    figure = _empty_figure(width=10.0, height=4.2, title=title)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    shades = _colour_by_step(left, steps)
    for spectrum, shade in zip(sorted_spectra, shades, strict=True):
        _draw_spectrum(left, spectrum, color=shade, width=1.1)
    _draw_spectrum(left, sorted_spectra[-1], color=shades[-1], width=2.4)
    _style_spectrum_axes(left, sorted_spectra)
    entropies = [float(torch.special.entr(spectrum).sum()) for spectrum in sorted_spectra]
    right.plot(steps, entropies, color=_MUTED, linewidth=1.2, zorder=1)
    right.scatter(steps, entropies, c=shades, s=26, zorder=2)
    _style_entropy_axes(right, len(sorted_spectra[0]))
    return figure


def spectrum_comparison_figure(spectra: Mapping[str, Tensor], *, title: str | None = None) -> "Figure":
    """Draw the eigenvalue spectra of several runs or layers on one pair of axes.

    Args:
        spectra: Name of the run to its eigenvalues, of shape ``(d,)``, in any order; ``d`` may differ.
        title: What stands above the figure.

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
    if not spectra:
        raise ValueError("`spectra` must have at least one spectrum, got none")
    sorted_spectra = {name: _checked(f"spectra[{name!r}]", spectrum) for name, spectrum in spectra.items()}
    figure = _empty_figure(width=7.2, height=4.4, title=title)
    axes = figure.subplots()
    for (name, spectrum), colour in zip(sorted_spectra.items(), cycle(_COLOURS), strict=False):
        effective_rank = float(torch.special.entr(spectrum).sum().exp())
        label = f"{name}: effective rank {effective_rank:.1f}"
        _draw_spectrum(axes, spectrum, color=colour, width=2.0, label=label)
    _style_spectrum_axes(axes, list(sorted_spectra.values()))
    axes.legend(frameon=False, fontsize=10, labelcolor=_INK)
    return figure


def require_matplotlib() -> None:
    """Say what to install if figures cannot be drawn.

    Raises:
        ImportError: If matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise ImportError("figures need matplotlib; run `pip install 'lightning-plugins[plots]'`")


def _checked(name: str, spectrum: Tensor) -> Tensor:
    if spectrum.ndim != 1 or not len(spectrum) or not torch.isfinite(spectrum).all():
        raise ValueError(f"`{name}` must be finite eigenvalues of shape (d,), got shape {tuple(spectrum.shape)}")
    return spectrum.detach().cpu().double().clamp_min(0.0).sort(descending=True).values


def _empty_figure(width: float, height: float, title: str | None) -> "Figure":
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    if title is not None:
        figure.suptitle(title, fontsize=13, color=_INK, x=0.012, ha="left")
    return figure


def _colour_by_step(axes: "Axes", steps: Sequence[int]) -> "list[ColorType]":
    """One colour per step, from dark to light, and their colour bar beside ``axes``."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    readable = ListedColormap(colormaps["viridis"](torch.linspace(0.0, 0.88, 256).numpy()))  # not its pale yellow end
    shade = ScalarMappable(Normalize(min(steps), max(*steps, min(steps) + 1)), readable)
    if len(steps) > 1 and axes.figure is not None:
        bar = axes.figure.colorbar(shade, ax=axes, pad=0.02, aspect=30)
        bar.set_label("training step", color=_INK, fontsize=10)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=9, colors=_MUTED)
    rows: list[ColorType] = [tuple(row) for row in shade.to_rgba(torch.tensor(steps).numpy())]
    return rows


def _draw_spectrum(
    axes: "Axes", spectrum: Tensor, *, color: "ColorType", width: float, label: str | None = None
) -> None:
    shown = spectrum[spectrum > spectrum[0] * 10.0**-_DECADES].tolist()
    alone = "o" if len(shown) == 1 else None  # a line through one point would not be seen
    axes.plot(range(1, len(shown) + 1), shown, color=color, linewidth=width, label=label, marker=alone, clip_on=False)


def _style_spectrum_axes(axes: "Axes", spectra: Sequence[Tensor]) -> None:
    _style(axes, "eigenvalue number", "eigenvalue of the autocorrelation")
    axes.set_yscale("log")
    longest = max(map(len, spectra))
    axes.set_xlim(1, max(longest, 2))
    for length in sorted({len(spectrum) for spectrum in spectra}):
        flat = 1 / length
        axes.plot([1, length], [flat, flat], color=_MUTED, linewidth=1.1, linestyle=(0, (5, 4)), zorder=1)
        _label_reference(axes, f"flat: 1/{length}", (length, flat), across="data")


def _style_entropy_axes(axes: "Axes", length: int) -> None:
    _style(axes, "training step", "von Neumann entropy (nats)")
    bound = math.log(length)
    axes.axhline(bound, color=_MUTED, linewidth=1.1, linestyle=(0, (5, 4)), zorder=1)
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
        color=_MUTED,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},  # grid lines stop at the words
        zorder=3,
    )


def _style(axes: "Axes", xlabel: str, ylabel: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(xlabel, color=_INK, fontsize=10)
    axes.set_ylabel(ylabel, color=_INK, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GRID)
    axes.tick_params(labelsize=9, colors=_MUTED, which="both", length=0)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
