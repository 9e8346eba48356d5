"""Lightning callbacks: they decide when to act, and call the other subpackages."""

from lightning_plugins.callbacks._attribution.batches import BatchKeys
from lightning_plugins.callbacks._attribution.selection import SampleSelection
from lightning_plugins.callbacks._compression.settings import Penalty, SearchSettings, Timing
from lightning_plugins.callbacks._monitors.collapse import CollapseLimits
from lightning_plugins.callbacks._rows.masks import LayerCall
from lightning_plugins.callbacks._rows.readout import Readout
from lightning_plugins.callbacks._terms.distances import MatchedOutputs
from lightning_plugins.callbacks._trainer.phases import Phase
from lightning_plugins.callbacks.attribution_evaluation import AttributionEvaluation
from lightning_plugins.callbacks.calibration_recorder import CalibrationRecorder
from lightning_plugins.callbacks.collapse_alarm import CollapseAlarm, RepresentationCollapseError
from lightning_plugins.callbacks.distillation import Distillation
from lightning_plugins.callbacks.early_termination import EarlyTermination
from lightning_plugins.callbacks.hybrid_compression import HybridCompression
from lightning_plugins.callbacks.layer_probe import LayerProbe
from lightning_plugins.callbacks.low_rank_compression import LowRankCompression
from lightning_plugins.callbacks.mask_scheduling import MaskScheduling
from lightning_plugins.callbacks.mutual_information import MutualInformationMonitor
from lightning_plugins.callbacks.point_cloud_augmentation import PointCloudAugmentation
from lightning_plugins.callbacks.probe_layers import probe_layers
from lightning_plugins.callbacks.rank_scheduling import RankScheduling
from lightning_plugins.callbacks.representation_monitor import RepresentationMonitor
from lightning_plugins.callbacks.representation_regularization import RepresentationRegularization
from lightning_plugins.callbacks.spectral_norm_cap import SpectralNormCap
from lightning_plugins.callbacks.spectrum_monitor import SpectrumMonitor
from lightning_plugins.callbacks.stable_rank import StableRankRegularization
from lightning_plugins.callbacks.von_neumann import VNERegularization
from lightning_plugins.callbacks.weight_regularization import WeightRegularization

__all__ = [
    "AttributionEvaluation",
    "BatchKeys",
    "CalibrationRecorder",
    "CollapseAlarm",
    "CollapseLimits",
    "Distillation",
    "EarlyTermination",
    "HybridCompression",
    "LayerCall",
    "LayerProbe",
    "LowRankCompression",
    "MaskScheduling",
    "MatchedOutputs",
    "MutualInformationMonitor",
    "Penalty",
    "Phase",
    "PointCloudAugmentation",
    "RankScheduling",
    "Readout",
    "RepresentationCollapseError",
    "RepresentationMonitor",
    "RepresentationRegularization",
    "SampleSelection",
    "SearchSettings",
    "SpectralNormCap",
    "SpectrumMonitor",
    "StableRankRegularization",
    "Timing",
    "VNERegularization",
    "WeightRegularization",
    "probe_layers",
]
