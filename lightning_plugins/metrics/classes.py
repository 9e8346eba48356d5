"""Base class of metrics of labelled embeddings: sums per class, and the scatter within and between classes."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_plugins._checks import check_positive_int, check_room
from lightning_plugins.functional.spectrum import full_precision
from lightning_plugins.functional.tensors import check_integers
from lightning_plugins.metrics._embeddings import check_embeddings
from lightning_plugins.metrics._sums import SumMetric


class Scatter(NamedTuple):
    """Covariances of labelled rows.

    Attributes:
        within: Mean over the rows of the squared deviation from their class' mean, shape ``(d, d)``.
        between: Mean over the classes with rows of the squared deviation of their means from the mean of these.
        classes: Number of classes with rows.
        rounding: Threshold below which eigenvalues of both are rounding errors of the sums.
    """

    within: Tensor
    between: Tensor
    classes: Tensor
    rounding: Tensor


class ClassMetric(SumMetric):
    """Base class of metrics of labelled embeddings, exact over batches and processes: sums per class and a Gram matrix.

    Args:
        num_features: Number of columns ``d`` of the embeddings.
        num_classes: Number of classes; labels are ``0 ... num_classes - 1``.

    Raises:
        ValueError: If a number is less than 1.
        TypeError: If a number is not an int.
    """

    gram: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.num_features = check_positive_int("num_features", num_features)
        self.num_classes = check_positive_int("num_classes", num_classes)
        check_room("num_features", num_features**2)
        check_room("num_classes", num_features * num_classes)
        self.add_state("gram", torch.zeros(num_features, num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(num_classes, num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Add the rows of one batch.

        Args:
            embeddings: Floating tensor of shape ``(N, num_features)``; half precision is upcast, without gradients.
            labels: Integer tensor of shape ``(N,)`` with numbers below ``num_classes``.

        Raises:
            TypeError: If ``embeddings`` is not a floating tensor or ``labels`` not an integer one.
            ValueError: If one has another shape.
        """
        rows = check_embeddings("embeddings", embeddings, self.num_features).detach().to(self.gram.dtype)
        check_labels(labels, len(rows), self.num_classes)
        labels = labels.long()
        with full_precision(rows):
            self.gram = torch.addmm(self.gram, rows.T, rows)
            self.sums = self.sums.index_add(0, labels, rows)
        self.counts = self.counts + torch.bincount(labels, minlength=self.num_classes)

    def scatter(self) -> Scatter:
        """The scatter of the rows seen by this process; within ``compute`` that of all processes.

        Returns:
            Covariances in the dtype of the sums; NaN if a row was not finite or there was none.
        """
        counts = self.counts.to(self.gram.dtype)
        present = (counts > 0).to(counts.dtype)
        means = self.sums / counts.clamp_min(1)[:, None]
        with full_precision(self.gram):
            within = (self.gram - means.T @ self.sums) / counts.sum()
            centred = (means - means.sum(0) / present.sum()) * present[:, None]
            between = centred.T @ centred / present.sum()
        rounding = len(within) * torch.finfo(within.dtype).eps * self.gram.trace() / counts.sum()
        return Scatter((within + within.T) / 2, between, present.sum(), rounding)


def check_labels(labels: Tensor, rows: int, num_classes: int) -> None:
    """Raise an error unless labels are one integer per row.

    Args:
        labels: The argument.
        rows: The required number.
        num_classes: Number of classes; checked only on a CPU, elsewhere an invalid label makes the kernel fail.

    Raises:
        TypeError: If it is not an integer tensor.
        ValueError: If it has another shape, or a label is not a class.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        kind = str(labels.dtype) if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"`labels` must be an integer tensor, got {kind}; convert it with `.long()`")
    check_integers("labels", labels)
    if tuple(labels.shape) != (rows,):
        raise ValueError(f"`labels` must have one number for each of {rows} rows, got shape {tuple(labels.shape)}")
    if labels.device.type == "cpu" and rows and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"`labels` must be in 0 to {num_classes - 1}, got {int(labels.min())} to {int(labels.max())}")


def spectrum_of(covariance: Tensor, rounding: Tensor | float = 0.0) -> Tensor:
    """Eigenvalues of a covariance, largest first, rounding errors set to zero; NaN if it is not finite.

    Args:
        covariance: Symmetric positive semidefinite tensor ``(d, d)``.
        rounding: Additional threshold for rounding errors.

    Returns:
        Tensor of shape ``(d,)``.
    """
    usable = torch.isfinite(covariance).all()
    values = torch.linalg.eigvalsh(torch.where(usable, covariance, 0.0)).flip(0)
    rounding = torch.clamp_min(len(values) * torch.finfo(values.dtype).eps * values[0], rounding)
    return torch.where(usable, torch.where(values > rounding, values, 0.0), torch.nan)


def effective_number(values: Tensor) -> Tensor:
    """``exp`` of the entropy of values normalised to sum 1; 1 if all are zero.

    Args:
        values: Non-negative tensor ``(d,)``.

    Returns:
        Scalar in ``[1, d]``.
    """
    total = values.sum()
    entropy: Tensor = torch.special.entr(values / total.masked_fill(total == 0, 1)).sum()
    return entropy.exp()
