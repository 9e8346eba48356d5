"""RankMe of all embeddings seen: effective rank from their singular values."""

import torch
from torch import Tensor

from lightning_plugins.metrics.gram import GramMetric, GramStatistics


class RankMe(GramMetric):
    """``exp`` of the entropy of the L1-normalised *singular values* of the unnormalised embeddings.

    The singular values are the square roots of the eigenvalues of the summed Gram matrix, so those below about
    ``1e-8 * sqrt(d)`` of the largest count as zero (``3e-4 * sqrt(d)`` on devices without float64). In
    ``[1, min(N, d)]``.

    Args:
        num_features: Number of columns ``d`` of the embeddings.

    Raises:
        ValueError: If ``num_features`` is less than 1.
        TypeError: If ``num_features`` is not an int.

    Example:
        >>> import torch
        >>> metric = RankMe(num_features=3)
        >>> round(metric(torch.diag(torch.tensor([1.0, 1.0, 0.0]))).item(), 4)
        2.0

    Source:
        Garrido et al., ICML 2023, https://arxiv.org/abs/2210.02885; Roy and Vetterli, EUSIPCO 2007. RankMe adds a small
        constant to the normalised singular values to keep the logarithm finite; here ``0 * log(0)`` is 0 instead, which
        is our reading of its purpose and gives the value of Roy and Vetterli.
    """

    higher_is_better = True
    plot_lower_bound = 1.0
    unit_rows = False

    @staticmethod
    def from_statistics(statistics: GramStatistics) -> Tensor:
        """Exponential of the entropy of the normalised roots of the eigenvalues."""
        singular_values = statistics.eigenvalues.sqrt()
        tiny = torch.finfo(singular_values.dtype).tiny  # all-zero rows: entropy 0
        entropy: Tensor = torch.special.entr(singular_values / singular_values.sum().clamp_min(tiny)).sum()
        return entropy.exp()
