"""The variance and covariance terms of VICReg, as loss terms."""

from torch import Tensor

from lightning_plugins._checks import check_positive_number
from lightning_plugins.functional.variance_covariance import covariance_penalty, variance_hinge
from lightning_plugins.regularizers.embedding_term import EmbeddingTerm, Scope


class VICRegVariance(EmbeddingTerm):
    """Loss term ``weight * mean(relu(target - std))`` over the features: it keeps the spread of each above a target.

    Args:
        weight: Factor on the term; 25 in VICReg, half of it on each of two views.
        target: Features with at least this standard deviation do not contribute.
        eps: Added to the variances.
        scope: See `EmbeddingTerm`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``weight`` is not finite, ``target`` or ``eps`` not above 0 or ``scope`` unknown.

    Example:
        >>> import torch
        >>> VICRegVariance()(torch.zeros(4, 3))
        tensor(0.9900)

    Source:
        Bardes, Ponce and LeCun, ICLR 2022, https://arxiv.org/abs/2105.04906.
    """

    def __init__(self, weight: float = 1.0, *, target: float = 1.0, eps: float = 1e-4, scope: Scope = "global") -> None:
        super().__init__(weight, scope=scope)
        self.target = check_positive_number("target", target)
        self.eps = check_positive_number("eps", eps)

    def measure(self, rows: Tensor) -> Tensor:
        """Return the mean shortfall of the standard deviations."""
        return variance_hinge(rows, target=self.target, eps=self.eps)

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"weight={self.weight}, target={self.target}, eps={self.eps}, scope={self.scope!r}"


class VICRegCovariance(EmbeddingTerm):
    """Loss term ``weight * sum(cov[i, j] ** 2) / d`` over the pairs of different features.

    Alone it is minimal at collapse: VICReg combines it with `VICRegVariance`.

    Args:
        weight: Factor on the term; 1 in VICReg, on each of two views.
        scope: See `EmbeddingTerm`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``weight`` is not finite or ``scope`` unknown.

    Example:
        >>> import torch
        >>> VICRegCovariance()(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
        tensor(4.)

    Source:
        Bardes, Ponce and LeCun, ICLR 2022, https://arxiv.org/abs/2105.04906.
    """

    def __init__(self, weight: float = 1.0, *, scope: Scope = "global") -> None:
        super().__init__(weight, scope=scope)

    def measure(self, rows: Tensor) -> Tensor:
        """Return the sum of the squared covariances over the number of features."""
        return covariance_penalty(rows)

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"weight={self.weight}, scope={self.scope!r}"
