"""The Rényi entropy of order 2 of a representation as a loss term: the regularizer of FroSSL."""

from torch import Tensor

from lightning_plugins.functional.entropy import renyi_entropy
from lightning_plugins.regularizers.embedding_term import EmbeddingTerm, Scope


class RenyiEntropy(EmbeddingTerm):
    """Loss term ``-weight * H2`` with ``H2 = -log(trace(C @ C))`` the Rényi entropy of order 2, in nats.

    ``C = Z.T @ Z / N`` with ``Z`` the rows scaled to unit length. It needs no spectrum. ``weight * log(trace(C @ C))``
    is the regularizing term of FroSSL for one view.

    Args:
        weight: Positive to raise the entropy, negative to lower it.
        centred: Whether the mean of all rows is subtracted first.
        scope: See `EmbeddingTerm`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``weight`` is not finite or ``scope`` unknown.

    Example:
        >>> import torch
        >>> RenyiEntropy(0.1)(torch.eye(4))  # four equal eigenvalues: -0.1 * log(4)
        tensor(-0.1386)

    Source:
        Skean et al. (FroSSL), ECCV 2024, https://arxiv.org/abs/2310.02903, in the form of its multi-view code: rows of
        unit length.
    """

    def __init__(self, weight: float = 1.0, *, centred: bool = False, scope: Scope = "global") -> None:
        super().__init__(weight, centred=centred, scope=scope)

    def measure(self, rows: Tensor) -> Tensor:
        """Return ``-H2``."""
        return -renyi_entropy(rows, order=2)
