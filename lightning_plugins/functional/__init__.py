"""The mathematics alone: tensors in, tensors out, no state and no Lightning."""

from lightning_plugins.functional.entropy import (
    diagonal_entropy,
    effective_rank,
    matrix_entropy,
    renyi_entropy,
    von_neumann_entropy,
)
from lightning_plugins.functional.preconditioning import gap_precondition
from lightning_plugins.functional.spectrum import autocorrelation_eigenvalues, normalize_rows

__all__ = [
    "autocorrelation_eigenvalues",
    "diagonal_entropy",
    "effective_rank",
    "gap_precondition",
    "matrix_entropy",
    "normalize_rows",
    "renyi_entropy",
    "von_neumann_entropy",
]
