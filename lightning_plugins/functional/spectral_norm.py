"""The largest singular value of weights, with a closed-form gradient."""

import torch
from torch import Tensor

from lightning_plugins.functional.gram_svd import check_matrices, gram_svd, unit_scale
from lightning_plugins.functional.soft_orthogonality import ValueAndGradient
from lightning_plugins.functional.spectrum import at_least_float32, full_precision, smaller_gram
from lightning_plugins.functional.split_spectrum import head_and_tail


def spectral_norm(weight: Tensor) -> Tensor:
    """The largest singular value. If the two largest coincide, the gradient is that of one of them.

    Args:
        weight: Floating tensor of shape ``(..., m, n)`` with ``m, n >= 1``.

    Returns:
        Tensor of shape ``(...)``, at least 0: float32 for float16 and bfloat16 input, else the input's dtype. NaN for a
        matrix with a non-finite value. It can be differentiated twice.

    Raises:
        TypeError: If ``weight`` is not a real floating tensor.
        ValueError: If ``weight`` has fewer than two dimensions, no rows or no columns.

    Example:
        >>> spectral_norm(torch.diag(torch.tensor([3.0, -5.0])))
        tensor(5.)

    Source:
        Yoshida and Miyato, 2017, https://arxiv.org/abs/1705.10941, for its use as a penalty.
    """
    check_matrices("weight", weight)
    with full_precision(weight):
        scaled, scale = unit_scale(at_least_float32(weight))
        # The Gram matrix is divided by the number of rows.
        head, _ = head_and_tail(smaller_gram(scaled), 1, 1)
        norm: Tensor = head * scale[..., 0, 0] * weight.shape[-2] ** 0.5
    return norm


def spectral_norm_gradient(weight: Tensor) -> ValueAndGradient:
    """`spectral_norm` and its gradient ``u @ v.T`` from one decomposition of the smaller Gram matrix.

    Args:
        weight: As for `spectral_norm`.

    Returns:
        Value and gradient, in float32 or float64; for a matrix of zeros the gradient is zero.

    Example:
        >>> spectral_norm_gradient(torch.diag(torch.tensor([3.0, -5.0]))).gradient
        tensor([[ 0.,  0.],
                [ 0., -1.]])
    """
    check_matrices("weight", weight)
    with torch.no_grad(), full_precision(weight):
        found = gram_svd(at_least_float32(weight))
        gradient = found.left[..., -1:] @ found.right[..., -1:, :] + found.poison[..., None, None]
        value = found.values[..., -1] + found.poison
        return ValueAndGradient(value, gradient.mT if weight.shape[-2] > weight.shape[-1] else gradient)
