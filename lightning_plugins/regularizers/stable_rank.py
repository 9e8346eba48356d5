"""The stable rank of weights, and what lies beyond a target rank, as loss terms."""

from torch import Tensor, nn

from lightning_plugins._checks import check_finite_number, check_positive_int
from lightning_plugins.functional.gram_svd import check_matrices
from lightning_plugins.functional.stable_rank import (
    Power,
    check_power,
    exact_gradient,
    modified_stable_rank,
    stable_rank,
)


class StableRank(nn.Module):
    """Loss term ``weight * SR`` with ``SR`` the stable rank: squared Frobenius norm over squared spectral norm.

    Args:
        weight: Positive to lower the stable rank, negative to raise it.

    Raises:
        TypeError: If ``weight`` is not a number.
        ValueError: If ``weight`` is not finite.

    Example:
        >>> import torch
        >>> StableRank(0.1)(torch.eye(4))
        tensor(0.4000)
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = check_finite_number("weight", weight)

    def forward(self, matrix: Tensor) -> Tensor:
        """Return ``weight * SR``, which can be differentiated twice.

        Args:
            matrix: Floating tensor of shape ``(..., m, n)``.

        Returns:
            Tensor of shape ``(...)``.
        """
        check_matrices("matrix", matrix)
        return self.weight * stable_rank(matrix)

    def value_and_gradient(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return the term and its gradient in closed form, without autograd.

        Args:
            matrix: Floating tensor of shape ``(..., m, n)``.

        Returns:
            Tensors of shapes ``(...)`` and ``(..., m, n)``.
        """
        check_matrices("matrix", matrix)
        value, gradient = exact_gradient(matrix, 1, 2)
        return self.weight * (1 + value), self.weight * gradient

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"weight={self.weight}"


class ModifiedStableRank(nn.Module):
    """Loss term ``weight * mSR``: the tail of the spectrum, beyond a target rank, relative to its head.

    ``mSR`` is the sum of ``s ** p`` over the singular values after the ``rank`` largest, divided by that over the
    ``rank`` largest. It does not depend on the scale of the matrix, so keep weight decay on.

    Args:
        weight: Positive to drive the matrix towards the rank, negative to fill the tail.
        rank: The target rank; a matrix whose smaller side is not above it has the term 0.
        p: 1 drives the tail to zero, 2 lowers it.

    Raises:
        TypeError: If ``weight`` is not a number or ``rank`` not an int.
        ValueError: If ``weight`` is not finite, ``rank`` less than 1, or ``p`` neither 1 nor 2.

    Example:
        >>> import torch
        >>> ModifiedStableRank(0.1, rank=2)(torch.eye(4))
        tensor(0.1000)

    Source:
        Our reading of Eo et al., https://arxiv.org/abs/2111.15179.
    """

    def __init__(self, weight: float, rank: int, p: Power = 1) -> None:
        super().__init__()
        self.weight = check_finite_number("weight", weight)
        self.rank = check_positive_int("rank", rank)
        self.p: Power = check_power(p)

    def forward(self, matrix: Tensor) -> Tensor:
        """Return ``weight * mSR``, which can be differentiated twice.

        Args:
            matrix: Floating tensor of shape ``(..., m, n)``.

        Returns:
            Tensor of shape ``(...)``.
        """
        check_matrices("matrix", matrix)
        return self.weight * modified_stable_rank(matrix, self.rank, self.p)

    def value_and_gradient(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return the term and its gradient in closed form, without autograd.

        Args:
            matrix: Floating tensor of shape ``(..., m, n)``.

        Returns:
            Tensors of shapes ``(...)`` and ``(..., m, n)``.
        """
        check_matrices("matrix", matrix)
        value, gradient = exact_gradient(matrix, self.rank, self.p)
        return self.weight * value, self.weight * gradient

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"weight={self.weight}, rank={self.rank}, p={self.p}"
