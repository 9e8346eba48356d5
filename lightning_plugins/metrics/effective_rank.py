"""Effective rank of all embeddings seen, from the eigenvalues of their autocorrelation matrix."""

from torch import Tensor

from lightning_plugins.metrics.gram import GramMetric, GramStatistics
from lightning_plugins.metrics.von_neumann_entropy import VonNeumannEntropy


class EffectiveRank(GramMetric):
    """``exp`` of the von Neumann entropy: the effective number of directions used by the embeddings.

    The entropy is that of the *eigenvalues* of the autocorrelation matrix of unit rows; `RankMe` uses the singular
    values of the raw rows. In ``[1, min(N, d)]`` and at most the rank, if no row is all-zero.

    Args:
        num_features: Number of columns ``d`` of the embeddings.

    Raises:
        ValueError: If ``num_features`` is less than 1.
        TypeError: If ``num_features`` is not an int.

    Example:
        >>> import torch
        >>> metric = EffectiveRank(num_features=5)
        >>> round(metric(torch.eye(5)[:3]).item(), 4)
        3.0

    Source:
        Kim et al., CVPR 2023, https://arxiv.org/abs/2304.01434.
    """

    higher_is_better = None
    plot_lower_bound = 1.0

    @staticmethod
    def from_statistics(statistics: GramStatistics) -> Tensor:
        """Exponential of the entropy of the eigenvalues."""
        return VonNeumannEntropy.from_statistics(statistics).exp()
