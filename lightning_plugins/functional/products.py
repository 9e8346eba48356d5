"""Sums of a matrix and a product: with the accuracy of float32 whatever the user's settings, or in place."""

import torch
from torch import Tensor


def add_product(base: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta * base + alpha * left @ right`` over a batch, with float32 accuracy even if TF32 is allowed.

    Where float32 products may run in TF32, the product is split in three whose sum is exact to about float32.

    Args:
        base: Tensor of shape ``(b, m, n)``, or one that broadcasts to it.
        left: Tensor of shape ``(b, m, k)``.
        right: Tensor of shape ``(b, k, n)``.
        beta: Factor on ``base``; with 0 its entries are ignored.
        alpha: Factor on the product.

    Returns:
        Tensor of shape ``(b, m, n)``.

    Example:
        >>> one = torch.eye(2)[None]
        >>> add_product(one, one, one, alpha=2)
        tensor([[[3., 0.],
                 [0., 3.]]])
    """
    if not rounds_to_tf32(left):
        return torch.baddbmm(base, left, right, beta=beta, alpha=alpha)
    left_high, right_high = _high_part(left), _high_part(right)
    result = torch.baddbmm(base, left - left_high, right_high, beta=beta, alpha=alpha)
    result = torch.baddbmm(result, left_high, right - right_high, alpha=alpha)
    return torch.baddbmm(result, left_high, right_high, alpha=alpha)


def add_outer_(matrix: Tensor, left: Tensor, right: Tensor, *, alpha: float = 1) -> Tensor:
    """Add ``alpha * left @ right`` in place, or its transpose to a matrix that is taller than wide.

    Args:
        matrix: Tensor of shape ``(m, n)`` or ``(b, m, n)``, of any layout in memory.
        left: Tensor of shape ``(..., min(m, n), k)``.
        right: Tensor of shape ``(..., k, max(m, n))``.
        alpha: Factor on the product.

    Returns:
        ``matrix``.

    Example:
        >>> add_outer_(torch.zeros(3, 1), torch.ones(1, 1), torch.tensor([[1.0, 2.0, 3.0]])).T
        tensor([[1., 2., 3.]])
    """
    wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    if wide.ndim == 2:
        wide.addmm_(left, right, alpha=alpha)
    else:
        wide.baddbmm_(left, right, alpha=alpha)
    return matrix


def rounds_to_tf32(tensor: Tensor) -> bool:
    """Return whether the user's settings (read-only here) let matrix products drop mantissa bits."""
    if not tensor.is_cuda or tensor.dtype != torch.float32:
        return False
    settings = torch.backends.cuda.matmul
    # If both exist, the older one raises an error if the newer one has been set.
    precision = getattr(settings, "fp32_precision", None)
    return bool(settings.allow_tf32) if precision is None else precision == "tf32"


def _high_part(tensor: Tensor) -> Tensor:
    """The leading 11 bits of float32 numbers (Veltkamp), which TF32 represents exactly."""
    stretched = tensor * (2**13 + 1)
    return stretched - (stretched - tensor)
