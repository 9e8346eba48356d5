"""Distance of the rows or columns of a weight from orthonormal ones."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_plugins.functional.gram_svd import check_matrices
from lightning_plugins.functional.spectrum import at_least_float32, full_precision


class ValueAndGradient(NamedTuple):
    """A function of matrices ``(..., m, n)`` and its gradient.

    Attributes:
        value: Shape ``(...)``.
        gradient: Shape ``(..., m, n)``.
    """

    value: Tensor
    gradient: Tensor


def soft_orthogonality(weight: Tensor) -> Tensor:
    """Squared Frobenius distance between the smaller Gram matrix of a weight and the identity.

    That is ``sum((s ** 2 - 1) ** 2)`` over the ``min(m, n)`` singular values, zero exactly for orthonormal rows
    (``m <= n``) or columns. The larger Gram matrix has the same gradient, and its value is larger by ``|m - n|``.

    Args:
        weight: Floating tensor of shape ``(..., m, n)`` with ``m, n >= 1``.

    Returns:
        Tensor of shape ``(...)``, at least 0: float32 for float16 and bfloat16 input, else the input's dtype. NaN or
        infinite where a matrix holds a value that is not finite.

    Raises:
        TypeError: If ``weight`` is not a real floating tensor.
        ValueError: If ``weight`` has fewer than two dimensions, no rows or no columns.

    Example:
        >>> soft_orthogonality(2 * torch.eye(2))  # (4 - 1) ** 2, twice
        tensor(18.)

    Source:
        Bansal, Chen and Wang (SO), NeurIPS 2018, https://arxiv.org/abs/1810.09102.
    """
    check_matrices("weight", weight)
    with full_precision(weight):
        return _excess(_wide(at_least_float32(weight))).square().sum((-2, -1))


def soft_orthogonality_gradient(weight: Tensor) -> ValueAndGradient:
    """`soft_orthogonality` and its gradient ``4 * (W @ W.T - I) @ W``, without autograd.

    Args:
        weight: As for `soft_orthogonality`.

    Returns:
        Value and gradient, in float32 or float64.

    Example:
        >>> soft_orthogonality_gradient(2 * torch.eye(1)).gradient  # 4 * (4 - 1) * 2
        tensor([[24.]])
    """
    check_matrices("weight", weight)
    with torch.no_grad(), full_precision(weight):
        wide = _wide(at_least_float32(weight))
        excess = _excess(wide)
        gradient = 4 * excess @ wide
        turned = weight.shape[-2] > weight.shape[-1]
        return ValueAndGradient(excess.square().sum((-2, -1)), gradient.mT if turned else gradient)


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix


def _excess(wide: Tensor) -> Tensor:
    return wide @ wide.mT - torch.eye(wide.shape[-2], dtype=wide.dtype, device=wide.device)
