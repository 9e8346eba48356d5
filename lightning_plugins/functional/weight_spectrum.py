"""Singular values of weights, and summary statistics."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_plugins.functional.gram_svd import check_matrices, gram_eigen
from lightning_plugins.functional.spectrum import full_precision


class SpectrumSummary(NamedTuple):
    """Summary of the singular values of a matrix.

    Attributes:
        stable_rank: Sum of their squares over the largest square; from 1 to the rank.
        effective_rank: ``exp`` of the entropy of the singular values divided by their sum, after Roy and Vetterli; from
            1 to the rank.
        spectral_norm: The largest singular value.
        tail_exponent: ``alpha`` of the power law ``x ** -alpha`` fitted to the largest squared singular values; see
            `power_law_tail`.
    """

    stable_rank: float
    effective_rank: float
    spectral_norm: float
    tail_exponent: float


def weight_singular_values(weight: Tensor) -> Tensor:
    """Singular values from the eigenvalues of the smaller Gram matrix, in float64 if the device supports it.

    Those below ``sqrt(8 * eps)`` of the largest (4e-8 in float64) are rounding errors and count as zero.

    Args:
        weight: Floating tensor of shape ``(..., m, n)`` with ``m, n >= 1``.

    Returns:
        Tensor of shape ``(..., min(m, n))``, largest first, without gradient; NaN for a matrix with a non-finite value.

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
    """The dtype of `weight_singular_values`: float64, or float32 on Apple GPUs, which lack float64."""
    return torch.float32 if weight.device.type == "mps" else torch.float64


def summarize_spectrum(values: Tensor) -> SpectrumSummary:
    """Summarise the singular values of one matrix.

    Args:
        values: Singular values, shape ``(n,)``, largest first.

    Returns:
        The four numbers; ranks of 1 if all values are zero, NaN if a value is NaN.

    Example:
        >>> summarize_spectrum(torch.tensor([2.0, 0.0, 0.0]))
        SpectrumSummary(stable_rank=1.0, effective_rank=1.0, spectral_norm=2.0, tail_exponent=nan)
    """
    values = values.double().cpu()
    largest = values[:1].masked_fill(values[:1] == 0, 1)
    shares = values / largest
    total = shares.sum()
    entropy = torch.special.entr(shares / total.masked_fill(total == 0, 1)).sum()
    stable = shares.square().sum()
    ranks = float(stable.masked_fill(stable == 0, 1)), float(entropy.exp())
    return SpectrumSummary(*ranks, float(values[0]), float(power_law_tail(values.square())))


def power_law_tail(eigenvalues: Tensor) -> Tensor:
    """Exponent of a power law fitted to the largest of positive numbers, with the start of the tail fitted too.

    For a tail that starts at the k-th largest number ``x[k]``, the maximum likelihood exponent is
    ``1 + k / sum(log(x[i] / x[k]))``; among up to 256 starts the one whose fit has the smallest Kolmogorov-Smirnov
    distance is chosen. Weights of well-trained networks were found between 2 and 6; random ones are above.

    Args:
        eigenvalues: Tensor of shape ``(n,)``, largest first; non-positive values are ignored.

    Returns:
        Scalar, float64; NaN with fewer than two positive numbers, or if all are equal.

    Example:
        >>> numbers = torch.linspace(0.999, 0.001, 999).sub(1).neg().pow(-1 / 2)  # of density x ** -3
        >>> round(power_law_tail(numbers.sort(descending=True).values).item(), 1)
        3.0

    Source:
        Clauset, Shalizi and Newman, SIAM Review 2009, https://arxiv.org/abs/0706.1062; Martin and Mahoney, JMLR 2021,
        https://arxiv.org/abs/1810.01075, for its use on weights.
    """
    logs = eigenvalues[eigenvalues > 0].double().log()
    number = len(logs)
    if number < 2 or not bool((logs[0] > logs[-1]) & logs.isfinite().all()):
        return logs.new_full((), torch.nan)
    starts = torch.linspace(1, number - 1, min(256, number - 1)).round().long().unique()  # so many are above the start
    excess = logs.cumsum(0)[starts] - starts.add(1) * logs[starts]
    excess = excess.masked_fill(excess <= 0, torch.nan)
    exponents = 1 + (starts + 1) / excess
    beyond = 1 - ((1 - exponents)[:, None] * (logs[None] - logs[starts, None])).exp()  # the law's share below each one
    position = torch.arange(number)
    empirical = 1 - position[None] / (starts + 1)[:, None]
    inside = position[None] <= starts[:, None]
    upper, lower = (beyond - empirical).abs(), (beyond - empirical + 1 / (starts + 1)[:, None]).abs()
    distance = torch.maximum(upper, lower).masked_fill(~inside, 0).amax(1)
    exponent: Tensor = exponents[distance.nan_to_num(nan=torch.inf).argmin()]
    return exponent
