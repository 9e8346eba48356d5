"""Neural collapse of labelled embeddings: variability within and between classes, and its ranks."""

from typing import Literal

import torch
from torch import Tensor

from lightning_plugins._checks import check_choice
from lightning_plugins.metrics.classes import ClassMetric, effective_number, spectrum_of


class NeuralCollapse(ClassMetric):
    """Variability within classes relative to that between them: ``trace(W @ pinv(B)) / K``, NC1.

    ``W`` is the covariance within the classes and ``B`` that of the ``K`` classes' means. It tends to zero as all rows
    of a class become equal.

    Args:
        num_features: Number of columns ``d`` of the embeddings.
        num_classes: Number of classes; labels are ``0 ... num_classes - 1``.

    Raises:
        ValueError: If a number is less than 1.
        TypeError: If a number is not an int.

    Example:
        >>> import torch
        >>> metric = NeuralCollapse(num_features=2, num_classes=2)
        >>> rows = torch.tensor([[1.0, 0.0], [3.0, 0.0], [-1.0, 0.0], [-3.0, 0.0]])  # within 1, between 4
        >>> metric(rows, torch.tensor([0, 0, 1, 1]))
        tensor(0.1250, dtype=torch.float64)

    Source:
        Papyan, Han and Donoho, PNAS 2020, https://arxiv.org/abs/2008.08186.
    """

    higher_is_better = None
    plot_lower_bound = 0.0

    def compute(self) -> Tensor:
        """Value over all rows of all batches and processes.

        Returns:
            Scalar in the dtype of the sums; NaN if fewer than two classes have rows, or one was not finite.
        """
        within, between, classes, _ = self.scatter()
        usable = torch.isfinite(between).all() & torch.isfinite(within).all() & (classes > 1)
        # The means of K classes span K - 1 directions: the rest is rounding error.
        inverse = torch.linalg.pinv(torch.where(usable, between, 0.0), rtol=1e-10, hermitian=True)
        return torch.where(usable, (within * inverse).sum() / classes, torch.nan)


class ClassRank(ClassMetric):
    """Effective rank of the covariance within classes, or between their means.

    ``exp`` of the entropy of the normalised eigenvalues. Under neural collapse the rank between classes tends to
    ``num_classes - 1`` while the variability within vanishes; a low rank between classes means that they share
    directions.

    Args:
        num_features: Number of columns ``d`` of the embeddings.
        num_classes: Number of classes; labels are ``0 ... num_classes - 1``.
        part: ``"within"`` or ``"between"``.

    Raises:
        ValueError: If a number is less than 1 or ``part`` unknown.
        TypeError: If a number is not an int.

    Example:
        >>> import torch
        >>> metric = ClassRank(num_features=3, num_classes=3, part="between")
        >>> round(metric(torch.eye(3), torch.arange(3)).item(), 4)
        2.0
    """

    higher_is_better = None
    plot_lower_bound = 1.0

    def __init__(self, num_features: int, num_classes: int, *, part: Literal["within", "between"] = "within") -> None:
        super().__init__(num_features, num_classes)
        self.part = check_choice("part", part, ("within", "between"))

    def compute(self) -> Tensor:
        """Value over all rows of all batches and processes.

        Returns:
            Scalar in the dtype of the sums; NaN if there was no row, or one that was not finite.
        """
        scatter = self.scatter()
        part = scatter.within if self.part == "within" else scatter.between
        return effective_number(spectrum_of(part, scatter.rounding))
