"""Figures of representations, weights and results; matplotlib is an extra, imported when a figure is drawn."""

from lightning_plugins.plots.adaptation import adaptation_figure, gains_figure
from lightning_plugins.plots.attribution import attribution_figure, degradation_figure
from lightning_plugins.plots.compression import compression_figure
from lightning_plugins.plots.information import information_figure
from lightning_plugins.plots.masks import choice_figure
from lightning_plugins.plots.point_cloud import point_cloud_figure
from lightning_plugins.plots.probes import attention_heat_map_figure, probe_profile_figure
from lightning_plugins.plots.ranks import rank_figure
from lightning_plugins.plots.search import arms_figure, regret_figure
from lightning_plugins.plots.spectra import spectrum_comparison_figure, spectrum_figure
from lightning_plugins.plots.style import require_matplotlib
from lightning_plugins.plots.trade_off import trade_off_figure
from lightning_plugins.plots.weights import layer_spectra_figure, weight_spectrum_figure

__all__ = [
    "adaptation_figure",
    "arms_figure",
    "attention_heat_map_figure",
    "attribution_figure",
    "choice_figure",
    "compression_figure",
    "degradation_figure",
    "gains_figure",
    "information_figure",
    "layer_spectra_figure",
    "point_cloud_figure",
    "probe_profile_figure",
    "rank_figure",
    "regret_figure",
    "require_matplotlib",
    "spectrum_comparison_figure",
    "spectrum_figure",
    "trade_off_figure",
    "weight_spectrum_figure",
]
