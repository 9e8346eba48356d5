"""Scores of feature attributions: localization, and the model's response to removing the attributed positions.

Maps are tensors ``(B, [C,] *spatial)`` of signals, images or volumes. Models are passed as functions from inputs to
logits.
"""

from lightning_plugins.functional.attribution.curves import (
    CurveSteps,
    curve_area,
    degradation_score,
    perturbation_curve,
    scaled_curve,
)
from lightning_plugins.functional.attribution.faithfulness import faithfulness_correlation
from lightning_plugins.functional.attribution.infidelity import NoiseDraws, infidelity
from lightning_plugins.functional.attribution.localization import (
    LocalizationScores,
    attribution_auroc,
    attribution_localization,
    localization_iou,
    pointing_game,
    relevance_rank_accuracy,
    top_k_intersection,
)
from lightning_plugins.functional.attribution.random import random_attributions
from lightning_plugins.functional.attribution.randomization import parameter_randomization
from lightning_plugins.functional.attribution.replacement import Perturbation
from lightning_plugins.functional.attribution.scoring import class_scores
from lightning_plugins.functional.attribution.sensitivity import sensitivity
from lightning_plugins.functional.attribution.spans import beat_spans, boxes_to_mask, spans_to_mask

__all__ = [
    "CurveSteps",
    "LocalizationScores",
    "NoiseDraws",
    "Perturbation",
    "attribution_auroc",
    "attribution_localization",
    "beat_spans",
    "boxes_to_mask",
    "class_scores",
    "curve_area",
    "degradation_score",
    "faithfulness_correlation",
    "infidelity",
    "localization_iou",
    "parameter_randomization",
    "perturbation_curve",
    "pointing_game",
    "random_attributions",
    "relevance_rank_accuracy",
    "scaled_curve",
    "sensitivity",
    "spans_to_mask",
    "top_k_intersection",
]
