"""Isotropy of all embeddings seen, without a spectrum."""

import torch
from torch import Tensor

from lightning_plugins.metrics.gram import GramMetric, GramStatistics


class Isotropy(GramMetric):
    """Evenness with which unit rows fill their space: ``1 / (d * tr(C @ C))``.

    ``tr(C @ C)`` is the frame potential, the mean squared cosine over all pairs of rows. The value is 1 for
    ``C = I / d`` and ``1 / d`` if all rows are parallel; ``log(d * isotropy)`` is the Rényi entropy of order 2, and
    ``d * isotropy`` the participation ratio of the eigenvalues. No eigenvalues are computed. All-zero rows are ignored;
    if there are no others the value is ``1 / d``.

    Args:
        num_features: Number of columns ``d`` of the embeddings.

    Raises:
        ValueError: If ``num_features`` is less than 1.
        TypeError: If ``num_features`` is not an int.

    Example:
        >>> import torch
        >>> metric = Isotropy(num_features=4)
        >>> round(metric(torch.eye(4)[:2]).item(), 4)  # two of four directions
        0.5

    Source:
        Frame potential: Benedetto and Fickus, Advances in Computational Mathematics, 2003. Its use as an isotropy in
        ``[1/d, 1]`` is our reading; other common isotropy measures are based on the partition function.
    """

    higher_is_better = None
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    @staticmethod
    def from_statistics(statistics: GramStatistics) -> Tensor:
        """Squared trace over ``d`` times the trace of the square; the trace is 1 except for all-zero rows."""
        matrix = statistics.autocorrelation
        trace, potential = matrix.trace(), matrix.square().sum()
        tiny = torch.finfo(matrix.dtype).tiny
        return torch.where(trace > 0, trace.square() / potential.clamp_min(tiny), 1.0) / len(matrix)
