"""Sums over the eigenvalues of a symmetric matrix, with closed-form first and second derivatives."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_plugins.functional.derivatives import last_derivative
from lightning_plugins.functional.spectrum import (
    decompose,
    finite_or_zero,
    full_precision,
    keep_signature,
    symmetric_product,
)


def spectral_sum(matrix: Tensor, *, power: float = 1.0, logarithm: bool = False) -> Tensor:
    """Sum of ``x ** power``, or of ``x ** power * log(x)``, over the eigenvalues ``x`` of a matrix.

    Both derivatives are expressed with eigenvalues and eigenvectors of a single decomposition, without differences of
    eigenvalues in a denominator: they are finite for equal and for vanishing eigenvalues. Where the true slope at zero
    is infinite, a floor is used: for ``power >= 1`` the slope is evaluated at ``eps ** 2`` times the largest
    eigenvalue; for ``power < 1``, eigenvalues below ``8 * eps`` times the largest are treated as rounding errors and
    dropped.

    Args:
        matrix: Symmetric positive semidefinite tensor of shape ``(..., n, n)``, float32 or float64. Only the lower
            triangle is read; the gradient is symmetric.
        power: Exponent, above 0.
        logarithm: Whether to multiply by the natural logarithm.

    Returns:
        Tensor of shape ``(...)``; NaN for a matrix with a non-finite value. It can be differentiated twice.

    Example:
        >>> spectral_sum(torch.diag(torch.tensor([0.25, 0.75])), power=2.0)
        tensor(0.6250)
    """
    # `requires_grad` is unreliable under `torch.func.vmap`: there the backward pass decomposes again.
    vectors = torch.is_grad_enabled() and matrix.requires_grad
    with full_precision(matrix):
        total: Tensor = _SpectralSum.apply(matrix, float(power), logarithm, vectors)[0]
    return total


def known_slope(
    matrix: Tensor, eigenvalues: Tensor, eigenvectors: Tensor, *, power: float = 1.0, logarithm: bool = False
) -> Tensor:
    """The gradient of ``spectral_sum`` from a given decomposition; differentiable once with respect to ``matrix``."""
    slope: Tensor = _Slope.apply(matrix, eigenvalues, eigenvectors, power, logarithm)
    return slope


def sum_over(eigenvalues: Tensor, power: float, logarithm: bool) -> Tensor:
    """Sum of ``x ** power``, times ``log(x)``, over the last dimension."""
    if power == 1 and logarithm:  # same result with fewer operations
        entropy: Tensor = torch.special.entr(eigenvalues.clamp_min(0)).sum(-1)
        return -entropy
    x = _floored(eigenvalues, power)
    term = eigenvalues.clamp_min(0)
    if power != 1:
        term = term * x.pow(power - 1)
    if power < 1:
        term = term * _kept(eigenvalues, x)
    return (term * x.log() if logarithm else term).sum(-1)


def floored_log(eigenvalues: Tensor) -> Tensor:
    """Logarithms, clamped at the floor of ``spectral_sum``."""
    return _floored(eigenvalues, 1.0).log()


def matrix_from(eigenvalues: Tensor, eigenvectors: Tensor) -> Tensor:
    """The symmetric matrices with these eigenvalues and eigenvectors."""
    return symmetric_product(eigenvectors * eigenvalues[..., None, :], eigenvectors)


class _SpectralSum(Function):
    generate_vmap_rule = True

    @staticmethod
    @keep_signature
    def forward(matrix: Tensor, power: float, logarithm: bool, vectors: bool) -> tuple[Tensor, Tensor, Tensor]:
        safe, poison = finite_or_zero(matrix)
        eigenvalues, eigenvectors = decompose(safe, vectors=vectors)
        return sum_over(eigenvalues, power, logarithm) + poison, eigenvalues, eigenvectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, bool, bool], output: tuple[Tensor, ...]) -> None:
        matrix, ctx.power, ctx.logarithm, ctx.vectors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(matrix, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, None, None, None]:
        if grad is None:
            return None, None, None, None
        matrix, eigenvalues, eigenvectors = ctx.saved_tensors
        with full_precision(matrix):
            if not ctx.vectors:
                eigenvalues, eigenvectors = decompose(finite_or_zero(matrix.detach())[0], vectors=True)
            slope = known_slope(matrix, eigenvalues, eigenvectors, power=ctx.power, logarithm=ctx.logarithm)
        return grad[..., None, None] * slope, None, None, None


class _Slope(Function):
    """The gradient of the sum, ``V diag(f'(x)) V.T``; its backward is the formula of Daleckii and Krein."""

    generate_vmap_rule = True

    @staticmethod
    @keep_signature
    def forward(matrix: Tensor, eigenvalues: Tensor, eigenvectors: Tensor, power: float, logarithm: bool) -> Tensor:
        return symmetric_product(eigenvectors * _slope(eigenvalues, power, logarithm)[..., None, :], eigenvectors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float, bool], output: Tensor) -> None:
        *tensors, ctx.power, ctx.logarithm = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @last_derivative  # eigenvalues and eigenvectors have no graph: a third derivative would be silently wrong
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        _, eigenvalues, eigenvectors = ctx.saved_tensors
        with full_precision(eigenvectors):
            inside = eigenvectors.mT @ ((grad + grad.mT) / 2) @ eigenvectors
            inside = inside * _divided_differences(eigenvalues, ctx.power, ctx.logarithm)
            return eigenvectors @ inside @ eigenvectors.mT, None, None, None, None


def _floored(eigenvalues: Tensor, power: float) -> Tensor:
    """Eigenvalues clamped to the floor (see ``spectral_sum``)."""
    info = torch.finfo(eigenvalues.dtype)
    # The second derivative of a power below 1 is at most the inverse square of the floor.
    relative, least = (info.eps**2, info.tiny) if power >= 1 else (8 * info.eps, info.tiny**0.5)
    return torch.maximum(eigenvalues, (eigenvalues[..., -1:] * relative).clamp_min(least))


def _kept(eigenvalues: Tensor, floored: Tensor) -> Tensor:
    """1 for eigenvalues kept with a power below 1, else 0."""
    return (eigenvalues == floored).to(eigenvalues.dtype)


def _slope(eigenvalues: Tensor, power: float, logarithm: bool) -> Tensor:
    """Derivative of ``x ** power``, times ``log(x)``."""
    x = _floored(eigenvalues, power)
    slope = power * x.log() + 1 if logarithm else torch.full_like(x, power)
    if power != 1:
        slope = slope * x.pow(power - 1)
    return slope * _kept(eigenvalues, x) if power < 1 else slope


def _divided_differences(eigenvalues: Tensor, power: float, logarithm: bool) -> Tensor:
    """``(f'(x_i) - f'(x_j)) / (x_i - x_j)``, and ``f''`` for equal ones, without cancellation."""
    x = _floored(eigenvalues, power)
    low, high = torch.minimum(x[..., None], x[..., None, :]), torch.maximum(x[..., None], x[..., None, :])
    log_ratio = torch.log1p((high - low) / low)
    equal = high == low
    gap = torch.where(equal, 1, high - low)
    # f' is a power times an affine function of the logarithm: the product rule of divided differences.
    result = torch.where(equal, power / low, power * log_ratio / gap) if logarithm else torch.zeros_like(gap)
    if power != 1:
        rising = low.pow(power - 1)
        of_power = torch.where(equal, (power - 1) * rising / low, rising * torch.expm1((power - 1) * log_ratio) / gap)
        result = result * rising + of_power * (power * high.log() + 1 if logarithm else power)
    if power >= 1:
        return result
    # A dropped eigenvalue counts as zero with slope zero.
    kept = _kept(eigenvalues, x)
    outside = torch.where(kept[..., None] > kept[..., None, :], x[..., None], x[..., None, :])
    slope = _slope(eigenvalues, power, logarithm)
    outside = (slope[..., None] + slope[..., None, :]) / outside
    both = kept[..., None] * kept[..., None, :]
    return both * result + (kept[..., None] - kept[..., None, :]).abs() * outside
