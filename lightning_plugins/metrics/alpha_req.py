"""Decay of the spectrum of all embeddings seen: the slope of a power law."""

import torch
from torch import Tensor

from lightning_plugins._checks import check_positive_int
from lightning_plugins.functional.spectrum import full_precision
from lightning_plugins.metrics._embeddings import valid_rows
from lightning_plugins.metrics.gram import GramMetric, GramStatistics

_FIRST, _LAST = 11, 50


class AlphaReQ(GramMetric):
    """Exponent ``alpha`` of a power law ``j ** -alpha`` fitted to the eigenvalues of the covariance.

    It is minus the slope of a least-squares line through ``(log(j), log(eigenvalue[j]))``, ``j`` counted from 1 at the
    largest one. In the paper, representations that generalise well have values around 1; a large value means that few
    directions hold nearly all the variance, and the value diverges at collapse.

    Args:
        num_features: Number of columns ``d`` of the embeddings.
        first: The first ``j`` of the fit; by default 11, or 1 if ``d`` is below 50.
        last: The last ``j`` of the fit; by default 50, or ``d`` if that is less.

    Raises:
        ValueError: If a number is less than 1, or ``last`` is not above ``first`` or exceeds ``num_features``.
        TypeError: If a number is not an int.

    Example:
        >>> import torch
        >>> rows = torch.diag(torch.arange(1.0, 5.0).pow(-0.5))  # variances 1, 1/2, 1/3, 1/4
        >>> metric = AlphaReQ(num_features=4)
        >>> round(metric(torch.cat([rows, -rows])).item(), 4)
        1.0

    Source:
        Agrawal et al., NeurIPS 2022, https://arxiv.org/abs/2202.05808. The range of the fit is our reading;
        eigenvalues within rounding error are excluded.
    """

    higher_is_better = None
    plot_lower_bound = 0.0
    unit_rows = False
    total: Tensor

    def __init__(self, num_features: int, *, first: int | None = None, last: int | None = None) -> None:
        super().__init__(num_features)
        few = num_features < _LAST
        self.first = check_positive_int("first", (1 if few else _FIRST) if first is None else first)
        self.last = check_positive_int("last", min(num_features, _LAST) if last is None else last)
        if num_features > 1 and not self.first < self.last <= num_features:
            raise ValueError(
                f"`last` must be after `first`={self.first} and at most `num_features`={num_features}, got {self.last}"
            )
        self.add_state("total", torch.zeros(num_features, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, embeddings: Tensor, mask: Tensor | None = None) -> None:
        """Add the rows of one batch.

        Args:
            embeddings: As for `RankMe.update`.
            mask: As for `RankMe.update`.

        Raises:
            TypeError: If ``embeddings`` is not a floating tensor, or ``mask`` neither bool nor integer.
            ValueError: If one has another shape.
        """
        super().update(embeddings, mask)
        rows, _ = valid_rows("embeddings", embeddings, self.num_features, mask)
        self.total = self.total + rows.to(self.total.dtype).sum(0)

    def compute(self) -> Tensor:
        """Value over all rows of all batches and processes.

        Returns:
            Scalar in the dtype of the sums; NaN if fewer than two eigenvalues are in the range of the fit, or a row was
            not finite.
        """
        with full_precision(self.summed):
            mean = self.total / self.count.clamp_min(1)
            statistics = GramStatistics(self.summed - torch.outer(mean, self.total), self.count)
        return statistics.or_nan(power_law_exponent(statistics.eigenvalues, self.first, self.last))

    @staticmethod
    def from_statistics(statistics: GramStatistics) -> Tensor:
        """The exponent from statistics of centred rows, over the default range."""
        few = len(statistics.eigenvalues) < _LAST
        return power_law_exponent(statistics.eigenvalues, 1 if few else _FIRST, _LAST)


def power_law_exponent(eigenvalues: Tensor, first: int, last: int) -> Tensor:
    """Minus the slope of a line fitted to the logarithms of indices and positive eigenvalues.

    Args:
        eigenvalues: Shape ``(d,)``, largest first, exactly zero where they are rounding errors.
        first: The first index of the fit, counted from 1.
        last: The last index.

    Returns:
        Scalar; NaN with fewer than two positive eigenvalues in the range.

    Example:
        >>> round(power_law_exponent(torch.tensor([1.0, 0.25, 1 / 9, 0.0]), 1, 4).item(), 4)
        2.0
    """
    values = eigenvalues[first - 1 : last]
    kept = values > 0  # weights instead of indexing, to avoid synchronisation
    x = torch.arange(first, first + len(values), device=values.device, dtype=values.dtype).log()
    y = values.masked_fill(~kept, 1).log()
    number = kept.sum()
    x = (x - (x * kept).sum() / number) * kept
    slope = (x * y).sum() / x.square().sum()
    return torch.where(number > 1, -slope, torch.nan)
