"""Decorrelated features as a loss term: the off-diagonal part of Barlow Twins."""

from torch import Tensor

from lightning_plugins._checks import check_positive_number
from lightning_plugins.functional.decorrelation import decorrelation
from lightning_plugins.regularizers.embedding_term import EmbeddingTerm, Scope


class Decorrelation(EmbeddingTerm):
    """Loss term ``weight * sum(C[i, j] ** 2)`` over the pairs of different features, ``C`` their correlations.

    Args:
        weight: Factor on the sum; 0.0051 in Barlow Twins.
        centred: Whether the mean row is subtracted first, as in a correlation.
        eps: Added to the variances.
        scope: See `EmbeddingTerm`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``weight`` is not finite, ``eps`` not above 0 or ``scope`` unknown.

    Example:
        >>> import torch
        >>> round(Decorrelation()(torch.tensor([[1.0, 1.0], [-1.0, -1.0]])).item(), 3)
        2.0

    Source:
        Zbontar et al. (Barlow Twins), ICML 2021, https://arxiv.org/abs/2103.03230; `functional.decorrelation` accepts a
        second view as in Barlow Twins; the single-view form of this term is ours.
    """

    def __init__(
        self, weight: float = 1.0, *, centred: bool = True, eps: float = 1e-5, scope: Scope = "global"
    ) -> None:
        super().__init__(weight, centred=centred, scope=scope)
        self.eps = check_positive_number("eps", eps)

    def measure(self, rows: Tensor) -> Tensor:
        """Return the sum of the squared correlations."""
        return decorrelation(rows, centred=False, eps=self.eps)  # the rows are already centred

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"{super().extra_repr()}, eps={self.eps}"
