"""The logarithm of a positive semidefinite matrix by matrix products alone, and the entropy based on it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_plugins.functional.derivatives import last_derivative
from lightning_plugins.functional.products import add_product
from lightning_plugins.functional.spectrum import full_precision, keep_signature

# On [0, 1], log(x) = CONSTANT + sum(LINEAR[j] * r[j]) + sum(BILINEAR[j] * r[j] * r[j + 1]) + error(x) with r[0] = x and
# r[j + 1] = GAIN * r[j] - (GAIN * r[j] / 2) ** 2: each map stretches what is near 0 and keeps [0, 1] within [0, 1]. The
# coefficients solve the linear programme that minimises the largest sqrt(x) * |error(x)|, ten times that for x >= 0.02.
# The gradient with respect to the rows of Z holds Z @ log(Z.T @ Z / N): its error, too, is weighted by sqrt(x).
_GAIN = 2.5
_CONSTANT = -15.10021
_LINEAR = (
    *(1.687478, 1.518538, 1.477359, 1.500053, 1.532407, 1.576975, 1.674226, 1.949693),
    *(2.957698, 5.215145, 1.837872, -0.7958042, 1.587694, 0.04565898, 2.669413),
)
_BILINEAR = (
    *(-0.4379328, -0.4993127, -0.5300767, -0.5593403, -0.5930431),
    *(-0.6373383, -0.7345674, -1.001987, -2.002526, -4.199193),
)


def _factors() -> list[float]:
    """Factors on ``r[j]``, such that the product of neighbours has that of their bilinear term, up to its sign."""
    factors = [1.0]
    for bilinear in _BILINEAR:
        factors.append(-bilinear / factors[-1])
    return factors + [1.0] * (len(_LINEAR) - len(factors))


# With them a row of blocks times a column of blocks is the sum of all bilinear terms: on a GPU each product that is
# launched by itself costs as much as one of that length, up to about this size.
_FACTORS = _factors()
_LARGEST_HELD = 1024


def log_by_products(matrix: Tensor) -> Tensor:
    """Logarithm of a symmetric positive semidefinite matrix by 25 matrix products, with a bounded error.

    No decomposition, no host synchronisation: works under CUDA graphs. With ``c`` an upper bound of the largest
    eigenvalue (see ``_upper_bound``), the eigenvalue ``x`` gets ``log(x) + e`` with ``|e| <= 4e-4 * sqrt(c / x)``, and
    ``|e| <= 4.3e-5 * sqrt(c / x)`` if ``x >= 0.02 * c``, plus rounding. An eigenvalue of zero gets ``log(c) - 15.1``.

    Where float32 products may run in TF32, every product is split in three whose sum is exact to about float32.

    Args:
        matrix: Symmetric positive semidefinite tensor of shape ``(..., n, n)``, float32 or float64.

    Returns:
        Symmetric tensor of the same shape; NaN throughout where a matrix holds a value that is not finite.

    Example:
        >>> log_by_products(torch.eye(2)).diagonal().abs() < 4.3e-5
        tensor([True, True])
    """
    n = matrix.shape[-1]
    flat = matrix.reshape(-1, n, n)
    trace = flat.detach().diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    trace = trace.masked_fill(trace == 0, 1)
    # Divide by the trace first: the fourth powers in the bound would underflow for tiny traces.
    r = flat / trace
    scale = _upper_bound(r.detach())
    r = r / scale
    log, held = r * _LINEAR[0], [r]
    for j, linear in enumerate(_LINEAR[1:], start=1):
        grow = _FACTORS[j] / _FACTORS[j - 1]
        r = add_product(r, r, r, beta=_GAIN * grow, alpha=-((_GAIN / 2) ** 2) * grow / _FACTORS[j - 1])
        log = log.add(r, alpha=linear / _FACTORS[j])
        if j <= len(_BILINEAR):
            held.append(r)
        if j == len(_BILINEAR) or (n > _LARGEST_HELD and len(held) > 1):
            log = _add_neighbours(log, held)
            held = [r]
    shift = (_CONSTANT + (trace * scale).log())[..., 0]
    return torch.diagonal_scatter(log, log.diagonal(dim1=-2, dim2=-1) + shift, dim1=-2, dim2=-1).reshape(matrix.shape)


def product_entropy(matrix: Tensor) -> Tensor:
    """``-trace(C @ log(C))`` by ``log_by_products``, with gradient ``-(log(C) + I)``; twice differentiable."""
    with full_precision(matrix):
        value: Tensor = _ProductEntropy.apply(matrix)[0]
    return value


def known_log(matrix: Tensor, log: Tensor) -> Tensor:
    """``log``, which is ``log_by_products(matrix)``, connected to ``matrix`` in the graph; differentiable once."""
    if not torch.is_grad_enabled():
        return log
    connected: Tensor = _KnownLog.apply(matrix, log)
    return connected


class _ProductEntropy(Function):
    generate_vmap_rule = True

    @staticmethod
    @keep_signature
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor]:
        log = log_by_products(matrix)
        return -(matrix * log).sum((-2, -1)), log

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> Tensor | None:
        if grad is None:
            return None
        matrix, log = ctx.saved_tensors
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        return -grad[..., None, None] * (known_log(matrix, log) + identity)


class _KnownLog(Function):
    generate_vmap_rule = True

    @staticmethod
    @keep_signature
    def forward(matrix: Tensor, log: Tensor) -> Tensor:
        return log.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    @last_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (matrix,) = ctx.saved_tensors
        with full_precision(matrix):
            grad_matrix: Tensor = torch.func.vjp(log_by_products, matrix)[1]((grad + grad.mT) / 2)[0]
        return grad_matrix, None


def _add_neighbours(log: Tensor, held: list[Tensor]) -> Tensor:
    """``log - sum(held[j] @ held[j + 1])``."""
    if len(held) > 2:
        left, right = torch.cat(held[:-1], -1), torch.cat(held[1:], -2)
    else:
        left, right = held
    return add_product(log, left, right, alpha=-1)


def _upper_bound(matrix: Tensor) -> Tensor:
    """An upper bound on the eigenvalues of matrices of trace 1 or 0, shape ``(b, 1, 1)``."""
    # The largest of n numbers with mean m and standard deviation s is at most m + s * sqrt(n - 1) (Samuelson). Here the
    # numbers are the squared eigenvalues. The bound is tight for one and for n equal ones, and at most n ** 0.25 times
    # too large.
    n = matrix.shape[-1]
    square = add_product(matrix, matrix, matrix, beta=0)
    mean, mean_of_squares = (each.square().sum((-2, -1), keepdim=True) / n for each in (matrix, square))
    # For nearly equal eigenvalues the variance is a difference of nearly equal numbers: add the rounding error.
    exact = 1 - 4 * torch.finfo(matrix.dtype).eps
    variance = torch.addcmul(mean_of_squares, mean, mean, value=-exact).clamp_min(0)
    # The largest of n numbers that add up to 1 is at least 1 / n; a matrix of zeros has no other bound.
    bound: Tensor = (mean + (variance * (n - 1)).sqrt()).sqrt().clamp_min(1 / n)
    return bound
