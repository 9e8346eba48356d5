"""The log-determinant coding rate of a representation as a loss term."""

from torch import Tensor

from lightning_plugins._checks import check_positive_number
from lightning_plugins.functional.coding_rate import coding_rate
from lightning_plugins.regularizers.embedding_term import EmbeddingTerm, Scope


class CodingRate(EmbeddingTerm):
    """Loss term ``-weight * R`` with ``R = logdet(I + d / (distortion * N) * Z.T @ Z) / 2`` the coding rate, in nats.

    ``Z`` are the rows scaled to unit length. Raising the rate is the expansion term of MCR²; as ``distortion`` tends to
    zero its gradient tends to that of ``logdet(C) / 2``, the uniformity of Matrix-SSL up to a factor.

    Args:
        weight: Positive to raise the rate, negative to lower it.
        distortion: The squared distortion up to which rows are coded, above 0: directions whose share of the spectrum
            is far below it have almost no effect.
        centred: Whether the mean of all rows is subtracted first.
        scope: See `EmbeddingTerm`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``weight`` is not finite, ``distortion`` not above 0 or ``scope`` unknown.

    Example:
        >>> import torch
        >>> CodingRate(0.1, distortion=1.0)(torch.eye(2))
        tensor(-0.0693)

    Source:
        Yu et al. (MCR²), NeurIPS 2020, https://arxiv.org/abs/2006.08558; Zhang et al. (Matrix-SSL), ICML 2024,
        https://arxiv.org/abs/2305.17326.
    """

    def __init__(
        self, weight: float = 1.0, *, distortion: float = 0.5, centred: bool = False, scope: Scope = "global"
    ) -> None:
        super().__init__(weight, centred=centred, scope=scope)
        self.distortion = check_positive_number("distortion", distortion)

    def measure(self, rows: Tensor) -> Tensor:
        """Return ``-R``."""
        return -coding_rate(rows, distortion=self.distortion)

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"{super().extra_repr()}, distortion={self.distortion}"
