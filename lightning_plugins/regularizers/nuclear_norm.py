"""The nuclear norm of weights as a loss term."""

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_finite_number
from lightning_plugins.functional.gram_svd import check_matrices
from lightning_plugins.functional.singular_values import polar_factor
from lightning_plugins.functional.spectrum import at_least_float32
from lightning_plugins.functional.stable_rank import nuclear_norm


class NuclearNorm(nn.Module):
    """Loss term ``weight * sum(s)`` over the singular values: it shrinks all of them equally, and small ones to zero.

    Args:
        weight: Factor on the norm; it depends on the scale of the matrix.

    Raises:
        TypeError: If ``weight`` is not a number.
        ValueError: If ``weight`` is not finite.

    Example:
        >>> import torch
        >>> NuclearNorm(0.1)(torch.diag(torch.tensor([3.0, -2.0])))
        tensor(0.5000)

    Source:
        Fazel, Hindi and Boyd, ACC 2001: the convex envelope of the rank.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = check_finite_number("weight", weight)

    def forward(self, matrix: Tensor) -> Tensor:
        """Return the term, which can be differentiated twice.

        Args:
            matrix: Floating tensor of shape ``(..., m, n)``.

        Returns:
            Tensor of shape ``(...)``.
        """
        check_matrices("matrix", matrix)
        return self.weight * nuclear_norm(matrix)

    def value_and_gradient(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return the term and its gradient, the polar factor, without autograd.

        Args:
            matrix: Floating tensor of shape ``(..., m, n)``.

        Returns:
            Tensors of shapes ``(...)`` and ``(..., m, n)``.
        """
        check_matrices("matrix", matrix)
        with torch.no_grad():
            factor = polar_factor(matrix)
            value = (factor * at_least_float32(matrix)).sum((-2, -1))
        return self.weight * value, self.weight * factor

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"weight={self.weight}"
