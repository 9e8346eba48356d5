"""Metrics of attributions: sums by class as states, a random baseline and skill beside every score."""

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
