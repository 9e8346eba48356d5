"""Orthonormal rows or columns of weights as a loss term."""

from torch import Tensor, nn

from lightning_plugins._checks import check_finite_number
from lightning_plugins.functional.gram_svd import check_matrices
from lightning_plugins.functional.soft_orthogonality import soft_orthogonality, soft_orthogonality_gradient


class SoftOrthogonality(nn.Module):
    """Loss term ``weight * ||W.T @ W - I||**2``, of the smaller Gram matrix: zero for orthonormal rows or columns.

    Args:
        weight: Factor on the squared distance; it depends on the scale of ``W``, so weight decay counteracts it.

    Raises:
        TypeError: If ``weight`` is not a number.
        ValueError: If ``weight`` is not finite.

    Example:
        >>> import torch
        >>> SoftOrthogonality(0.1)(2 * torch.eye(2))
        tensor(1.8000)

    Source:
        Bansal, Chen and Wang, NeurIPS 2018, https://arxiv.org/abs/1810.09102.
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
        return self.weight * soft_orthogonality(matrix)

    def value_and_gradient(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return the term and its gradient in closed form, without autograd.

        Args:
            matrix: Floating tensor of shape ``(..., m, n)``.

        Returns:
            Tensors of shapes ``(...)`` and ``(..., m, n)``.
        """
        check_matrices("matrix", matrix)
        value, gradient = soft_orthogonality_gradient(matrix)
        return self.weight * value, self.weight * gradient

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"weight={self.weight}"
