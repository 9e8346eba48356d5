"""Von Neumann entropy of all embeddings seen."""

import torch
from torch import Tensor

from lightning_plugins.metrics.gram import GramMetric, GramStatistics


class VonNeumannEntropy(GramMetric):
    """Entropy, in nats, of the spectrum of the autocorrelation matrix of all embeddings seen.

    With rows ``z`` scaled to unit length and ``C = Z.T @ Z / N`` over all batches and ranks, the value is
    ``-sum(p * log(p))`` of the eigenvalues of ``C``, in ``[0, log(min(N, d))]``. It is not the mean of the batches'
    entropies, which is lower: the entropy is concave in ``C``. All-zero rows stay zero and lower the trace of ``C``, as
    in `lightning_plugins.functional.von_neumann_entropy`; the bounds hold without them.

    Args:
        num_features: Number of columns ``d`` of the embeddings.

    Raises:
        ValueError: If ``num_features`` is less than 1.
        TypeError: If ``num_features`` is not an int.

    Example:
        >>> import torch
        >>> metric = VonNeumannEntropy(num_features=4)
        >>> metric.update(torch.eye(4)[:2])
        >>> metric.update(torch.eye(4)[2:])
        >>> metric.compute()  # four equal eigenvalues: log(4)
        tensor(1.3863, dtype=torch.float64)

    Source:
        Kim et al., CVPR 2023, https://arxiv.org/abs/2304.01434.
    """

    higher_is_better = None  # higher or lower may be better, depending on the use
    plot_lower_bound = 0.0

    @staticmethod
    def from_statistics(statistics: GramStatistics) -> Tensor:
        """Entropy of the eigenvalues."""
        entropy: Tensor = torch.special.entr(statistics.eigenvalues).sum()
        return entropy
