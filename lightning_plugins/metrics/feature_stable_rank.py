"""Stable rank of all embeddings seen: squared Frobenius norm over squared spectral norm."""

import torch
from torch import Tensor

from lightning_plugins.metrics.gram import GramMetric, GramStatistics


class FeatureStableRank(GramMetric):
    """Sum of the squared singular values of the unnormalised embeddings over the largest square.

    It is at most the rank, and falls to 1 as one direction, such as a common mean, dominates all others. In
    ``[1, min(N, d)]``; 1 if all rows are zero.

    Args:
        num_features: Number of columns ``d`` of the embeddings.

    Raises:
        ValueError: If ``num_features`` is less than 1.
        TypeError: If ``num_features`` is not an int.

    Example:
        >>> import torch
        >>> metric = FeatureStableRank(num_features=3)
        >>> round(metric(torch.diag(torch.tensor([2.0, 2.0, 1.0]))).item(), 4)
        2.25

    Source:
        Rudelson and Vershynin, Journal of the ACM 2007.
    """

    higher_is_better = True
    plot_lower_bound = 1.0
    unit_rows = False

    @staticmethod
    def from_statistics(statistics: GramStatistics) -> Tensor:
        """Sum of the eigenvalues over the largest."""
        eigenvalues = statistics.eigenvalues
        largest = eigenvalues[0]
        return torch.where(largest > 0, eigenvalues.sum() / largest.masked_fill(largest == 0, 1), 1.0)
