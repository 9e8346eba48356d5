"""LiDAR of all embeddings seen: rank of the directions that separate samples relative to the spread of views."""

import torch
from torch import Tensor

from lightning_plugins._checks import check_positive_int, check_positive_number, check_room
from lightning_plugins.functional.spectrum import full_precision
from lightning_plugins.functional.tensors import check_floating
from lightning_plugins.metrics._sums import SumMetric
from lightning_plugins.metrics.classes import ClassMetric, effective_number, spectrum_of


class LiDAR(SumMetric):
    """Effective rank of ``W^-1/2 @ B @ W^-1/2``, from several views of each sample.

    ``B`` is the covariance of the samples' means over their views, ``W`` the covariance of views around these plus
    ``delta`` times the identity. The rank is ``exp`` of the entropy of the normalised eigenvalues, in ``[1, d]``.
    Unlike `RankMe` it does not count directions in which views of one sample differ as much as different samples.

    Args:
        num_features: Number of columns ``d`` of the embeddings.
        delta: Added to ``W``, above 0.

    Raises:
        ValueError: If ``num_features`` is less than 1 or ``delta`` not above 0.
        TypeError: If ``num_features`` is not an int or ``delta`` not a number.

    Example:
        >>> import torch
        >>> samples = torch.cat([torch.eye(3), -torch.eye(3)])
        >>> metric = LiDAR(num_features=3)
        >>> round(metric(torch.stack([samples, samples], dim=1)).item(), 4)  # views alike, samples in three directions
        3.0

    Source:
        Thilak et al., ICLR 2024, https://arxiv.org/abs/2312.04000, with its ``delta``; it adds a small constant to the
        normalised eigenvalues to keep the logarithm finite, here ``0 * log(0)`` is 0.
    """

    higher_is_better = True
    plot_lower_bound = 1.0

    within: Tensor
    gram: Tensor
    total: Tensor
    samples: Tensor
    views: Tensor

    def __init__(self, num_features: int, *, delta: float = 1e-4) -> None:
        super().__init__()
        self.num_features = check_positive_int("num_features", num_features)
        check_room("num_features", num_features**2)
        self.delta = check_positive_number("delta", delta)
        square = torch.zeros(num_features, num_features, dtype=torch.float64)
        self.add_state("within", square.clone(), dist_reduce_fx="sum")
        self.add_state("gram", square, dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("views", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, views: Tensor) -> None:
        """Add samples with all their views.

        Args:
            views: Floating tensor of shape ``(N, q, num_features)``: ``q >= 2`` views of each of ``N`` samples.

        Raises:
            TypeError: If ``views`` is not a floating tensor.
            ValueError: If it has another shape.
        """
        check_floating("views", views)
        if views.ndim != 3 or views.shape[1] < 2 or views.shape[2] != self.num_features:
            raise ValueError(
                f"`views` must have shape (N, q, {self.num_features}) with two views or more of each sample, got "
                f"{tuple(views.shape)}; stack them with `torch.stack(views, dim=1)`"
            )
        rows = views.detach().to(self.total.dtype)
        means = rows.mean(1)
        apart = (rows - means[:, None]).flatten(0, 1)
        with full_precision(rows):
            self.within = torch.addmm(self.within, apart.T, apart)
            self.gram = torch.addmm(self.gram, means.T, means)
        self.total = self.total + means.sum(0)
        self.samples = self.samples + len(rows)
        self.views = self.views + len(apart)

    def compute(self) -> Tensor:
        """Value over all samples of all batches and processes.

        Returns:
            Scalar in the dtype of the sums; NaN if there was no sample, or one that was not finite.
        """
        with full_precision(self.gram):
            mean = self.total / self.samples
            between = self.gram / self.samples - torch.outer(mean, mean)
            return lidar(self.within / self.views, between, self.delta)


class LabelledLiDAR(ClassMetric):
    """`LiDAR` with the rows of a class in place of the views of a sample.

    Args:
        num_features: Number of columns ``d`` of the embeddings.
        num_classes: Number of classes; labels are ``0 ... num_classes - 1``.
        delta: Added to the covariance within classes, above 0.

    Raises:
        ValueError: If a number is out of its range.
        TypeError: If a number is of the wrong type.

    Example:
        >>> import torch
        >>> metric = LabelledLiDAR(num_features=3, num_classes=3)
        >>> round(metric(torch.eye(3), torch.arange(3)).item(), 4)
        2.0

    Source:
        Thilak et al., ICLR 2024, https://arxiv.org/abs/2312.04000; using labels in place of samples is our
        interpretation.
    """

    higher_is_better = True
    plot_lower_bound = 1.0

    def __init__(self, num_features: int, num_classes: int, *, delta: float = 1e-4) -> None:
        super().__init__(num_features, num_classes)
        self.delta = check_positive_number("delta", delta)

    def compute(self) -> Tensor:
        """Value over all rows of all batches and processes.

        Returns:
            Scalar in the dtype of the sums; NaN if there was no row, or one that was not finite.
        """
        scatter = self.scatter()
        return lidar(scatter.within, scatter.between, self.delta)


def lidar(within: Tensor, between: Tensor, delta: float) -> Tensor:
    """The effective rank of the between-covariance whitened by the within-covariance.

    Args:
        within: Covariance ``(d, d)``.
        between: Covariance ``(d, d)``.
        delta: Added to the diagonal of ``within``.

    Returns:
        Scalar; NaN where a covariance is not finite.
    """
    usable = torch.isfinite(within).all() & torch.isfinite(between).all()
    values, vectors = torch.linalg.eigh(torch.where(usable, within, 0.0))
    whitening = vectors * (values.clamp_min(0) + delta).rsqrt()
    whitened = whitening.T @ torch.where(usable, between, 0.0) @ whitening
    return torch.where(usable, effective_number(spectrum_of((whitened + whitened.T) / 2)), torch.nan)
