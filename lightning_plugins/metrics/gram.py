"""What the spectral metrics share: a Gram matrix summed over batches and ranks, and its spectrum."""

from abc import abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from lightning_plugins._checks import check_positive_int
from lightning_plugins.functional.spectrum import full_precision, normalize_rows
from lightning_plugins.metrics._embeddings import check_embeddings
from lightning_plugins.metrics._sums import SumMetric


class GramStatistics:
    """A summed Gram matrix and what several metrics want to know of it, each worked out once.

    Nothing here asks the device whether there are rows, or whether all are finite: the spectrum of a matrix that is
    not usable is taken to be zero, and `or_nan` marks what was computed from it.

    Args:
        gram: ``H.T @ H`` summed over all rows, of shape ``(d, d)``.
        count: Number of rows, an integer scalar.
    """

    def __init__(self, gram: Tensor, count: Tensor) -> None:
        self.count = count
        self._usable = torch.isfinite(gram).all() & (count > 0)
        self.autocorrelation = torch.where(self._usable, gram / count.clamp_min(1), 0.0)

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues of the autocorrelation matrix, shape ``(d,)``, largest first, rounding errors set to zero."""
        values = torch.linalg.eigvalsh(self.autocorrelation).flip(0)
        rounding = len(values) * torch.finfo(values.dtype).eps * values[0]
        return torch.where(values > rounding, values, 0.0)

    def or_nan(self, value: Tensor) -> Tensor:
        """``value``, or NaN if there was no row, or one that was not finite."""
        return torch.where(self._usable, value, torch.nan)


class GramMetric(SumMetric):
    """Base of the metrics that are functions of the Gram matrix of all embeddings seen.

    The state is the ``(d, d)`` sum of the batches' Gram matrices and the number of rows, so the result does not depend
    on how the rows were split into batches or over ranks; ranks may hold different numbers of rows, or none. Sums and
    spectra are in float64 (float32 on devices without it), whatever the dtype of the embeddings.

    Args:
        num_features: Number of columns ``d`` of the embeddings; known from the start so that a rank without rows
            takes part in the sum over ranks.

    Raises:
        ValueError: If ``num_features`` is less than 1.
        TypeError: If ``num_features`` is not an int.
    """

    unit_rows = True  # whether rows are scaled to unit length before they are summed
    gram: Tensor
    count: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = check_positive_int("num_features", num_features)
        self.add_state("gram", torch.zeros(num_features, num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, embeddings: Tensor) -> None:
        """Add the rows of one batch.

        Args:
            embeddings: Floating tensor of shape ``(N, num_features)``; half precision is cast up, no gradient flows.

        Raises:
            TypeError: If ``embeddings`` is not a floating tensor.
            ValueError: If it has another shape.
        """
        rows = check_embeddings("embeddings", embeddings, self.num_features).detach().to(self.gram.dtype)
        if self.unit_rows:
            rows = normalize_rows(rows)
        with full_precision(rows):  # float32 sums, where there is no float64, are not for autocast
            self.gram = torch.addmm(self.gram, rows.T, rows)  # not in place: the old sum may be an inference tensor
        self.count = self.count + len(rows)

    def compute(self) -> Tensor:
        """Value over all rows of all batches and ranks.

        Returns:
            Scalar in the dtype of the sums; NaN if there was no row, or one that was not finite.
        """
        statistics = GramStatistics(self.gram, self.count)
        return statistics.or_nan(self.from_statistics(statistics))

    def statistics(self) -> GramStatistics:
        """The sums over all ranks, for several metrics to share; every rank has to ask.

        Returns:
            The summed statistics; this metric goes on from the sums of its own rank.
        """
        with self.sync_context():
            return GramStatistics(self.gram, self.count)

    @staticmethod
    @abstractmethod
    def from_statistics(statistics: GramStatistics) -> Tensor:
        """The metric's value from the summed Gram matrix; subclasses say how."""
