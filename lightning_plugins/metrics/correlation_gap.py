"""Entropy of the embeddings lost to correlations between features."""

import torch
from torch import Tensor

from lightning_plugins.metrics.gram import GramMetric, GramStatistics
from lightning_plugins.metrics.von_neumann_entropy import VonNeumannEntropy


class CorrelationGap(GramMetric):
    """``H(diag C) - S(C)`` in nats: zero exactly if no two features are correlated.

    ``C`` is the autocorrelation matrix of unit rows, ``H(diag C)`` the entropy of the features' shares of its trace,
    ``S(C)`` the von Neumann entropy. In ``[0, log(d)]``; the scale of the embeddings does not matter.

    Args:
        num_features: Number of columns ``d`` of the embeddings.

    Raises:
        ValueError: If ``num_features`` is less than 1.
        TypeError: If ``num_features`` is not an int.

    Example:
        >>> import torch
        >>> metric = CorrelationGap(num_features=2)
        >>> metric(torch.tensor([[1.0, 1.0], [2.0, 2.0]]))  # two identical features: log(2)
        tensor(0.6931, dtype=torch.float64)

    Source:
        The inequality ``S(C) <= H(diag C)`` is classical (the eigenvalues majorise the diagonal); its use as a measure
        of correlation is ours.
    """

    higher_is_better = False
    plot_lower_bound = 0.0

    @staticmethod
    def from_statistics(statistics: GramStatistics) -> Tensor:
        """Entropy of the diagonal minus entropy of the eigenvalues, clamped at zero."""
        diagonal = statistics.autocorrelation.diagonal()
        bound: Tensor = torch.special.entr(diagonal).sum()
        return (bound - VonNeumannEntropy.from_statistics(statistics)).clamp_min(0.0)
