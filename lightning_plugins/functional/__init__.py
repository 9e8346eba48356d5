"""Pure functions: tensors in, tensors out, no state and no Lightning."""

from lightning_plugins.functional.attention_correlation import cls_attention_correlation
from lightning_plugins.functional.attribution import beat_spans, spans_to_mask
from lightning_plugins.functional.boxes import bev_overlap, part_occupancy, points_in_boxes, rotate_z
from lightning_plugins.functional.class_information import (
    binary_symmetric_channel_crossover,
    binary_symmetric_channel_information,
    class_entropy,
    class_posterior_information,
    class_posterior_scores,
    gaussian_information,
    infonce_ceiling,
)
from lightning_plugins.functional.coding_rate import coding_rate
from lightning_plugins.functional.decorrelation import decorrelation
from lightning_plugins.functional.distillation import cosine_error, feature_error, soft_target_divergence
from lightning_plugins.functional.document_frequency import inverse_document_frequency
from lightning_plugins.functional.entropy import (
    diagonal_entropy,
    effective_rank,
    matrix_entropy,
    renyi_entropy,
    von_neumann_entropy,
)
from lightning_plugins.functional.epps_pulley import epps_pulley, random_directions
from lightning_plugins.functional.evidence import Evidence, log_evidence
from lightning_plugins.functional.folds import assign_folds, group_normal, hash_groups, hash_rows
from lightning_plugins.functional.ground import ground_height
from lightning_plugins.functional.hidden_points import hidden_points
from lightning_plugins.functional.information import (
    donsker_varadhan_bound,
    infonce_bound,
    js_bound,
    mine_loss,
    nwj_bound,
    smile_bound,
)
from lightning_plugins.functional.masks import annealed_sigmoid, hard_concrete, hard_concrete_open, straight_through
from lightning_plugins.functional.pair_scores import bound_from_pairs, pair_scores
from lightning_plugins.functional.pooling import pool_embeddings
from lightning_plugins.functional.preconditioning import gap_precondition
from lightning_plugins.functional.range_image import (
    RangeGrid,
    close_gaps,
    nearest_ranges,
    visible_in_range_image,
)
from lightning_plugins.functional.ridge import HeldOutSums, ProbeScores, probe_scores, ridge_path
from lightning_plugins.functional.singular_values import polar_factor, singular_value_threshold
from lightning_plugins.functional.soft_orthogonality import soft_orthogonality
from lightning_plugins.functional.spectral_norm import spectral_norm
from lightning_plugins.functional.spectrum import autocorrelation_eigenvalues, normalize_rows
from lightning_plugins.functional.spread_out import spread_out
from lightning_plugins.functional.stable_rank import modified_stable_rank, nuclear_norm, stable_rank
from lightning_plugins.functional.subspace import top_singular_subspace
from lightning_plugins.functional.variance_covariance import covariance_penalty, variance_hinge

__all__ = [
    "Evidence",
    "HeldOutSums",
    "ProbeScores",
    "RangeGrid",
    "annealed_sigmoid",
    "assign_folds",
    "autocorrelation_eigenvalues",
    "beat_spans",
    "bev_overlap",
    "binary_symmetric_channel_crossover",
    "binary_symmetric_channel_information",
    "bound_from_pairs",
    "class_entropy",
    "class_posterior_information",
    "class_posterior_scores",
    "close_gaps",
    "cls_attention_correlation",
    "coding_rate",
    "cosine_error",
    "covariance_penalty",
    "decorrelation",
    "diagonal_entropy",
    "donsker_varadhan_bound",
    "effective_rank",
    "epps_pulley",
    "feature_error",
    "gap_precondition",
    "gaussian_information",
    "ground_height",
    "group_normal",
    "hard_concrete",
    "hard_concrete_open",
    "hash_groups",
    "hash_rows",
    "hidden_points",
    "infonce_bound",
    "infonce_ceiling",
    "inverse_document_frequency",
    "js_bound",
    "log_evidence",
    "matrix_entropy",
    "mine_loss",
    "modified_stable_rank",
    "nearest_ranges",
    "normalize_rows",
    "nuclear_norm",
    "nwj_bound",
    "pair_scores",
    "part_occupancy",
    "points_in_boxes",
    "polar_factor",
    "pool_embeddings",
    "probe_scores",
    "random_directions",
    "renyi_entropy",
    "ridge_path",
    "rotate_z",
    "singular_value_threshold",
    "smile_bound",
    "soft_orthogonality",
    "soft_target_divergence",
    "spans_to_mask",
    "spectral_norm",
    "spread_out",
    "stable_rank",
    "straight_through",
    "top_singular_subspace",
    "variance_hinge",
    "visible_in_range_image",
    "von_neumann_entropy",
]
