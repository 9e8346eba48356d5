"""Singular values of weights, and the few numbers that sum them up."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_plugins.functional.gram_svd import check_matrices, gram_eigen
from lightning_plugins.functional.spectrum import full_precision


class SpectrumSummary(NamedTuple):
    """What singular values say of a matrix.

    Attributes:
        stable_rank: Sum of their squares over the largest square; from 1 to the rank.
        effective_rank: ``exp`` of the entropy of the singular values divided by their sum, after Roy and Vetterli; from
            1 to the rank.
        spectral_norm: The largest singular value.
    """

    stable_rank: float
    effective_rank: float
    spectral_norm: float


def weight_singular_values(weight: Tensor) -> Tensor:
    """Singular values from the eigenvalues of the smaller Gram matrix, in float64 where the device has it.

    Those below ``sqrt(8 * eps)`` of the largest (4e-8 in float64) are rounding errors and count as zero.

    Args:
        weight: Floating tensor of shape ``(..., m, n)`` with ``m, n >= 1``.

    Returns:
        Tensor of shape ``(..., min(m, n))``, largest first, without gradient; NaN where a matrix holds a value that is
        not finite.

    Raises:
        TypeError: If ``weight`` is not a real floating tensor.
        ValueError: If ``weight`` has fewer than two dimensions, no rows or no columns.

    Example:
        >>> weight_singular_values(torch.diag(torch.tensor([1.0, -3.0, 0.0])))
        tensor([3., 1., 0.], dtype=torch.float64)
    """
    check_matrices("weight", weight)
    with torch.no_grad(), full_precision(weight):
        matrix = weight.to(spectrum_dtype(weight))
        eigenvalues, _, _, scale, poison = gram_eigen(matrix, vectors=False)
        squares = eigenvalues.flip(-1)
        least = 8 * torch.finfo(squares.dtype).eps * squares[..., :1]
        # The Gram matrix is divided by the number of rows.
        scale = scale[..., 0] * matrix.shape[-2] ** 0.5
        values: Tensor = torch.where(squares > least, squares, 0).sqrt() * scale + poison[..., None]
    return values


def spectrum_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of `weight_singular_values`: float64, but float32 on Apple's GPUs, which have no other."""
    return torch.float32 if weight.device.type == "mps" else torch.float64


def summarize_spectrum(values: Tensor) -> SpectrumSummary:
    """Sum up the singular values of one matrix.

    Args:
        values: Singular values, shape ``(n,)``, largest first.

    Returns:
        The three numbers; ranks of 1 for zeros alone, NaN where a value is NaN.

    Example:
        >>> summarize_spectrum(torch.tensor([2.0, 0.0, 0.0]))
        SpectrumSummary(stable_rank=1.0, effective_rank=1.0, spectral_norm=2.0)
    """
    values = values.double().cpu()
    largest = values[:1].masked_fill(values[:1] == 0, 1)
    shares = values / largest
    total = shares.sum()
    entropy = torch.special.entr(shares / total.masked_fill(total == 0, 1)).sum()
    stable = shares.square().sum()
    return SpectrumSummary(float(stable.masked_fill(stable == 0, 1)), float(entropy.exp()), float(values[0]))
