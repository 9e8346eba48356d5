"""The mathematics alone: tensors in, tensors out, no state and no Lightning."""

from lightning_plugins.functional.entropy import (
    diagonal_entropy,
    effective_rank,
    matrix_entropy,
    renyi_entropy,
    von_neumann_entropy,
)
from lightning_plugins.functional.masks import annealed_sigmoid, hard_concrete, hard_concrete_open, straight_through
from lightning_plugins.functional.preconditioning import gap_precondition
from lightning_plugins.functional.singular_values import polar_factor, singular_value_threshold
from lightning_plugins.functional.spectrum import autocorrelation_eigenvalues, normalize_rows
from lightning_plugins.functional.stable_rank import modified_stable_rank, nuclear_norm, stable_rank
from lightning_plugins.functional.subspace import top_singular_subspace

__all__ = [
    "annealed_sigmoid",
    "autocorrelation_eigenvalues",
    "diagonal_entropy",
    "effective_rank",
    "gap_precondition",
    "hard_concrete",
    "hard_concrete_open",
    "matrix_entropy",
    "modified_stable_rank",
    "normalize_rows",
    "nuclear_norm",
    "polar_factor",
    "renyi_entropy",
    "singular_value_threshold",
    "stable_rank",
    "straight_through",
    "top_singular_subspace",
    "von_neumann_entropy",
]
