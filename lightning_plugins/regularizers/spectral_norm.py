"""The spectral norm of weights as a loss term."""

from torch import Tensor, nn

from lightning_plugins._checks import check_finite_number
from lightning_plugins.functional.gram_svd import check_matrices
from lightning_plugins.functional.spectral_norm import spectral_norm, spectral_norm_gradient


class SpectralNorm(nn.Module):
    """Loss term ``weight * s1 ** power`` with ``s1`` the largest singular value.

    Args:
        weight: Factor on the power.
        power: 2 for the penalty of Yoshida and Miyato, up to their factor of a half; 1 for the norm itself.

    Raises:
        TypeError: If ``weight`` is not a number.
        ValueError: If ``weight`` is not finite, or ``power`` neither 1 nor 2.

    Example:
        >>> import torch
        >>> SpectralNorm(0.1)(torch.diag(torch.tensor([3.0, -5.0])))
        tensor(2.5000)

    Source:
        Yoshida and Miyato, 2017, https://arxiv.org/abs/1705.10941.
    """

    def __init__(self, weight: float = 1.0, *, power: int = 2) -> None:
        super().__init__()
        self.weight = check_finite_number("weight", weight)
        if isinstance(power, bool) or not isinstance(power, int) or power not in {1, 2}:
            raise ValueError(f"`power` must be 1 or 2, got {power!r}")
        self.power = power

    def forward(self, matrix: Tensor) -> Tensor:
        """Return the term, which can be differentiated twice.

        Args:
            matrix: Floating tensor of shape ``(..., m, n)``.

        Returns:
            Tensor of shape ``(...)``.
        """
        check_matrices("matrix", matrix)
        norm = spectral_norm(matrix)
        return self.weight * (norm.square() if self.power == 2 else norm)

    def value_and_gradient(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return the term and its gradient in closed form, without autograd.

        Args:
            matrix: Floating tensor of shape ``(..., m, n)``.

        Returns:
            Tensors of shapes ``(...)`` and ``(..., m, n)``.
        """
        check_matrices("matrix", matrix)
        norm, gradient = spectral_norm_gradient(matrix)
        if self.power == 1:
            return self.weight * norm, self.weight * gradient
        return self.weight * norm.square(), 2 * self.weight * norm[..., None, None] * gradient

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"weight={self.weight}, power={self.power}"
