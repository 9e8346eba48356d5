"""Data for the methods of this package: few-shot tasks, pairs of samples, point clouds."""

from typing import TYPE_CHECKING, Any

from lightning_plugins.data._episode_counts import EpisodeCounts
from lightning_plugins.data.document_frequencies import DocumentFrequencies
from lightning_plugins.data.ecg import (
    ECGRecord,
    ECGWindows,
    ecg_windows,
    read_ecg,
    read_ecg_folder,
    synthetic_ecg,
)
from lightning_plugins.data.kitti import KITTIFrames, read_kitti_labels, read_kitti_points
from lightning_plugins.data.mosaic import Mosaics, mosaics
from lightning_plugins.data.object_bank import BankObject, ObjectBank
from lightning_plugins.data.pairs import BinaryChannelPairs, SameClassPairs, SameClassPairSampler
from lightning_plugins.data.raycast import Scan, Shape, SpinningSensor, prism, scan
from lightning_plugins.data.scenes import RaycastScenes, frame_of

if TYPE_CHECKING:
    from lightning_plugins.data.episodes import EpisodicDataModule

__all__ = [
    "BankObject",
    "BinaryChannelPairs",
    "DocumentFrequencies",
    "ECGRecord",
    "ECGWindows",
    "EpisodeCounts",
    "EpisodicDataModule",
    "KITTIFrames",
    "Mosaics",
    "ObjectBank",
    "RaycastScenes",
    "SameClassPairSampler",
    "SameClassPairs",
    "Scan",
    "Shape",
    "SpinningSensor",
    "ecg_windows",
    "frame_of",
    "mosaics",
    "prism",
    "read_ecg",
    "read_ecg_folder",
    "read_kitti_labels",
    "read_kitti_points",
    "scan",
    "synthetic_ecg",
]


def __getattr__(name: str) -> Any:
    if name == "EpisodicDataModule":  # needs Lightning, unlike the data sets
        from lightning_plugins.data.episodes import EpisodicDataModule

        return EpisodicDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
