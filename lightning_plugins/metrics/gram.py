"""Base class of spectral metrics: a Gram matrix summed over batches and processes, and its spectrum."""

from abc import abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from lightning_plugins._checks import check_positive_int, check_room
from lightning_plugins.functional.spectrum import full_precision, normalize_rows
from lightning_plugins.metrics._embeddings import valid_rows
from lightning_plugins.metrics._sums import SumMetric


class GramStatistics:
    """A summed Gram matrix and derived quantities shared by several metrics, each computed once.

    Nothing here synchronises the device to check for rows or finite values: the spectrum of an unusable matrix is set
    to zero, and `or_nan` marks results computed from it.

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
        """``value``, or NaN if there was no row or a non-finite one."""
        return torch.where(self._usable, value, torch.nan)


class GramMetric(SumMetric):
    """Base class of metrics that are functions of the Gram matrix of all embeddings seen.

    The state is the ``(d, d)`` sum of the batches' Gram matrices and the number of rows, so the result does not depend
    on how the rows were split into batches or over ranks; ranks may hold different numbers of rows, or none. Sums and
    spectra are in float64 (float32 on devices without it), whatever the dtype of the embeddings.

    Args:
        num_features: Number of columns ``d`` of the embeddings; needed in advance so that a rank without rows can take
            part in the sum over ranks.

    Raises:
        ValueError: If ``num_features`` is less than 1.
        TypeError: If ``num_features`` is not an int.
    """

    unit_rows = True  # whether rows are scaled to unit length before they are summed
    count: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = check_positive_int("num_features", num_features)
        check_room("num_features", num_features**2)
        # A collection shares states of equal names between metrics: other sums need another name.
        self._sums = "gram" if self.unit_rows else "raw_gram"
        self.add_state(self._sums, torch.zeros(num_features, num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @property
    def summed(self) -> Tensor:
        """The sum of the batches' Gram matrices."""
        summed: Tensor = getattr(self, self._sums)
        return summed

    def update(self, embeddings: Tensor, mask: Tensor | None = None) -> None:
        """Add the rows of one batch.

        Args:
            embeddings: Floating tensor of shape ``(N, num_features)``, or with a mask also ``(N, L, num_features)``;
                half precision is upcast, without gradients.
            mask: Bool or integer tensor of the shape of ``embeddings`` without its last dimension, true where a row
                counts; None for all.

        Raises:
            TypeError: If ``embeddings`` is not a floating tensor, or ``mask`` neither bool nor integer.
            ValueError: If one has another shape.
        """
        rows, count = valid_rows("embeddings", embeddings, self.num_features, mask)
        rows = rows.to(self.summed.dtype)
        if self.unit_rows:
            rows = normalize_rows(rows)
        with full_precision(rows):  # float32 sums, on devices without float64, must not be autocast
            # not in place: the old sum may be an inference tensor
            setattr(self, self._sums, torch.addmm(self.summed, rows.T, rows))
        self.count = self.count + count

    def compute(self) -> Tensor:
        """Value over all rows of all batches and ranks.

        Returns:
            Scalar in the dtype of the sums; NaN if there was no row, or one that was not finite.
        """
        statistics = GramStatistics(self.summed, self.count)
        return statistics.or_nan(self.from_statistics(statistics))

    def statistics(self) -> GramStatistics:
        """The sums over all ranks, for several metrics to share; a collective call.

        Returns:
            The summed statistics; this metric keeps the sums of its own rank.
        """
        with self.sync_context():
            return GramStatistics(self.summed, self.count)

    @staticmethod
    @abstractmethod
    def from_statistics(statistics: GramStatistics) -> Tensor:
        """The metric's value from the summed Gram matrix; implemented by subclasses."""
