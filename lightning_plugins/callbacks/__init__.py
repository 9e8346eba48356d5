"""Lightning callbacks: they decide when, and call what stands in the other folders."""

from lightning_plugins.callbacks.low_rank_compression import LowRankCompression
from lightning_plugins.callbacks.representation_monitor import RepresentationMonitor
from lightning_plugins.callbacks.spectrum_monitor import SpectrumMonitor
from lightning_plugins.callbacks.stable_rank import StableRankRegularization
from lightning_plugins.callbacks.von_neumann import VNERegularization

__all__ = [
    "LowRankCompression",
    "RepresentationMonitor",
    "SpectrumMonitor",
    "StableRankRegularization",
    "VNERegularization",
]
