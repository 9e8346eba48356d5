"""Embeddings spread out over the sphere, as a loss term."""

from torch import Tensor

from lightning_plugins.functional.spread_out import spread_out
from lightning_plugins.regularizers.embedding_term import EmbeddingTerm, Scope


class SpreadOut(EmbeddingTerm):
    """Loss term ``weight * (M1 ** 2 + relu(M2 - 1 / d))``, of the inner products of different unit rows.

    ``M1`` is their mean and ``M2`` their mean square: 0 and ``1 / d`` for the uniform distribution on the sphere.

    Args:
        weight: Factor on the term.
        centred: Whether the mean of all rows is subtracted first.
        scope: See `EmbeddingTerm`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``weight`` is not finite or ``scope`` unknown.

    Example:
        >>> import torch
        >>> SpreadOut()(torch.ones(3, 4))
        tensor(1.7500)

    Source:
        Zhang et al. (GOR), ICCV 2017, https://arxiv.org/abs/1708.06320, over all pairs of rows.
    """

    def __init__(self, weight: float = 1.0, *, centred: bool = False, scope: Scope = "global") -> None:
        super().__init__(weight, centred=centred, scope=scope)

    def measure(self, rows: Tensor) -> Tensor:
        """Return ``M1 ** 2 + relu(M2 - 1 / d)``."""
        return spread_out(rows)
