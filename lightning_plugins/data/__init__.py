"""Data for the methods of this package: few-shot tasks, pairs of samples, point clouds."""

from typing import TYPE_CHECKING, Any

from lightning_plugins.data.document_frequencies import DocumentFrequencies
from lightning_plugins.data.pairs import BinaryChannelPairs, SameClassPairs, SameClassPairSampler

if TYPE_CHECKING:
    from lightning_plugins.data.episodes import EpisodicDataModule

__all__ = ["DocumentFrequencies", "EpisodicDataModule"]
from lightning_plugins.data.ecg import (
    ECGRecord,
    ECGWindows,
    ecg_windows,
    read_ecg,
    read_ecg_folder,
    synthetic_ecg,
)
from lightning_plugins.data.mosaic import Mosaics, mosaics

__all__ = [
    "ECGRecord",
    "ECGWindows",
    "EpisodicDataModule",
    "Mosaics",
    "ecg_windows",
    "mosaics",
    "read_ecg",
    "read_ecg_folder",
    "synthetic_ecg",
]
__all__ = ["BinaryChannelPairs", "EpisodicDataModule", "SameClassPairSampler", "SameClassPairs"]


def __getattr__(name: str) -> Any:
    if name == "EpisodicDataModule":  # needs Lightning, which the data sets beside it do without
        from lightning_plugins.data.episodes import EpisodicDataModule

        return EpisodicDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
