"""Metrics of representations and of few-shot tasks, exact over batches and ranks.

All representation metrics but `Alignment` and `Uniformity` are functions of summed Gram matrices (per class or view if
they take labels or views): cheap to update, exact however the rows are split, and with memory independent of the number
of rows.
"""

from lightning_plugins.metrics._probe.result import ProbeResult
from lightning_plugins.metrics._probe.settings import ProbeClassifier
from lightning_plugins.metrics._tasks import MeanWithInterval
from lightning_plugins.metrics.adaptation import AdaptationCurve
from lightning_plugins.metrics.alignment import Alignment
from lightning_plugins.metrics.alpha_req import AlphaReQ
from lightning_plugins.metrics.attention_correlation import AttentionCorrelation, CLSAttentionCorrelation
from lightning_plugins.metrics.attribution import (
    AttributionAUROC,
    AttributionLocalization,
    AttributionScore,
    DegradationScore,
    FaithfulnessCorrelation,
    Infidelity,
    LocalizationIoU,
    PointingGame,
    RegionPerturbation,
    RelevanceRankAccuracy,
    Sensitivity,
)
from lightning_plugins.metrics.correlation_gap import CorrelationGap
from lightning_plugins.metrics.effective_rank import EffectiveRank
from lightning_plugins.metrics.feature_stable_rank import FeatureStableRank
from lightning_plugins.metrics.few_shot import FewShotAccuracy, FewShotAccuracyInterval
from lightning_plugins.metrics.isotropy import Isotropy
from lightning_plugins.metrics.lidar import LabelledLiDAR, LiDAR
from lightning_plugins.metrics.linear_probe import LinearProbe
from lightning_plugins.metrics.mutual_information import MutualInformation
from lightning_plugins.metrics.nearest_neighbour_probe import NearestNeighbourProbe, NearestNeighbourResult
from lightning_plugins.metrics.neural_collapse import ClassRank, NeuralCollapse
from lightning_plugins.metrics.rank_me import RankMe
from lightning_plugins.metrics.uniformity import Uniformity
from lightning_plugins.metrics.von_neumann_entropy import VonNeumannEntropy

__all__ = [
    "AdaptationCurve",
    "Alignment",
    "AlphaReQ",
    "AttentionCorrelation",
    "AttributionAUROC",
    "AttributionLocalization",
    "AttributionScore",
    "CLSAttentionCorrelation",
    "ClassRank",
    "CorrelationGap",
    "DegradationScore",
    "EffectiveRank",
    "FaithfulnessCorrelation",
    "FeatureStableRank",
    "FewShotAccuracy",
    "FewShotAccuracyInterval",
    "Infidelity",
    "Isotropy",
    "LabelledLiDAR",
    "LiDAR",
    "LinearProbe",
    "LocalizationIoU",
    "MeanWithInterval",
    "MutualInformation",
    "NearestNeighbourProbe",
    "NearestNeighbourResult",
    "NeuralCollapse",
    "PointingGame",
    "ProbeClassifier",
    "ProbeResult",
    "RankMe",
    "RegionPerturbation",
    "RelevanceRankAccuracy",
    "Sensitivity",
    "Uniformity",
    "VonNeumannEntropy",
]
