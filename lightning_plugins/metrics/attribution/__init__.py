"""Attribution metrics: sums per class as states, with a random baseline and skill for every score."""

from lightning_plugins.metrics.attribution.base import AttributionScore
from lightning_plugins.metrics.attribution.faithfulness import FaithfulnessCorrelation, Infidelity, Sensitivity
from lightning_plugins.metrics.attribution.localization import (
    AttributionAUROC,
    AttributionLocalization,
    LocalizationIoU,
    PointingGame,
    RelevanceRankAccuracy,
)
from lightning_plugins.metrics.attribution.perturbation import DegradationScore, RegionPerturbation

__all__ = [
    "AttributionAUROC",
    "AttributionLocalization",
    "AttributionScore",
    "DegradationScore",
    "FaithfulnessCorrelation",
    "Infidelity",
    "LocalizationIoU",
    "PointingGame",
    "RegionPerturbation",
    "RelevanceRankAccuracy",
    "Sensitivity",
]
