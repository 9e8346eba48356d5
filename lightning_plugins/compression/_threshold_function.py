"""The map from a weight to itself with lower singular values, its gradient, and their products."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv1d
from torch.nn.grad import conv1d_weight

from lightning_plugins.functional.spectrum import decompose, finite_or_zero, full_precision

_BY_CONVOLUTION_FROM = 128
_BLOCKS_FROM = 256


class Basis(NamedTuple):
    """Left singular vectors of a wide matrix, ``(m, m)``, its singular values in rising order, and 0 or NaN."""

    vectors: Tensor
    values: Tensor
    poison: Tensor


def wide_view(weight: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A weight as a matrix with at least as many columns as rows, without a copy.

    Args:
        weight: Tensor of shape ``(out, in, ...)``, dense in memory, in whatever order of its dimensions.

    Returns:
        The matrix, whose columns are in the order of the memory, which no singular value depends on; and what turns
        such a matrix into one of the weight's shape.
    """
    order = [0, *sorted(range(1, weight.ndim), key=weight.stride, reverse=True)]
    ordered = weight.permute(order)
    matrix = ordered.flatten(1)
    turned = matrix.shape[0] > matrix.shape[1]
    back = sorted(range(weight.ndim), key=order.__getitem__)

    def restore(wide: Tensor) -> Tensor:
        return (wide.mT if turned else wide).reshape(ordered.shape).permute(back)

    return (matrix.mT if turned else matrix), restore


def decompose_wide(wide: Tensor) -> Basis:
    """Singular values and left singular vectors, from the eigendecomposition of ``W @ W.T``.

    Args:
        wide: Matrix of shape ``(m, n)``.

    Returns:
        The basis.
    """
    with torch.no_grad():
        gram, poison = finite_or_zero(_lower_gram(wide))
        squares, vectors = decompose(gram, vectors=True, overwrite=True)
        return Basis(vectors, squares.clamp_min(0).sqrt(), poison)


class Lower(Function):
    """``Q @ W`` with ``Q = U diag(max(1 - tau / s, 0)) U.T`` from a decomposition of ``W @ W.T``.

    The gradient is ``Q @ G + A @ W`` with ``A = U (C * (P + P.T)) U.T``, where ``P = U.T @ G @ W.T @ U`` and ``C`` are
    the divided differences of ``Q``'s eigenvalues as a function of those of ``W @ W.T``. It is that of singular value
    thresholding, without a matrix of the size of ``V``.
    """

    @staticmethod
    def forward(ctx: Any, wide: Tensor, tau: Tensor, vectors: Tensor, values: Tensor, poison: Tensor) -> Tensor:
        kept = _kept(values, tau)
        factors = torch.where(kept, 1 - tau / torch.where(kept & (tau > 0), values, 1), 0)
        matrix = (vectors * (factors + poison)) @ vectors.mT
        ctx.save_for_backward(wide, tau, vectors, values, matrix)
        return _product(matrix, wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wide, tau, vectors, values, matrix = ctx.saved_tensors
        with full_precision(wide):
            safe, kept = _safe(values), _kept(values, tau)
            inner = _product_of_rows(grad, wide)
            twice = _product(_product(vectors.mT, inner + inner.mT), vectors)
            of_tau = torch.where(kept, twice.diagonal() / (-2 * safe), 0).sum()
            core = _slopes(safe, tau, kept).mul_(twice)
            if not ctx.needs_input_grad[0]:
                return None, of_tau, None, None, None
            of_wide = _product(matrix, grad)
            of_wide += _product(_product(_product(vectors, core), vectors.mT), wide)
            return of_wide, of_tau, None, None, None


class Values(Function):
    """The singular values of a decomposition of ``M @ M.T`` with ``M = diag(scale) @ W`` as a function of ``W``."""

    @staticmethod
    def forward(ctx: Any, wide: Tensor, scale: Tensor | None, vectors: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(wide, scale, vectors, values)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wide, scale, vectors, values = ctx.saved_tensors
        with full_precision(wide):
            rows = vectors if scale is None else vectors * scale[:, None]
            return _product((rows * (grad / _safe(values))) @ rows.mT, wide), None, None, None


def _safe(values: Tensor) -> Tensor:
    """Singular values to divide by: below the root of the rounding error of the Gram matrix they are noise."""
    least = torch.finfo(values.dtype).eps ** 0.5 * values.amax()
    return torch.maximum(values, least).clamp_min(torch.finfo(values.dtype).tiny ** 0.25)


def _kept(values: Tensor, tau: Tensor) -> Tensor:
    """Which singular values are above the threshold; without threshold all are."""
    return (values > tau) | (tau <= 0)


def _slopes(values: Tensor, tau: Tensor, kept: Tensor) -> Tensor:
    """``(q_i - q_j) / (s_i ** 2 - s_j ** 2)`` with ``q = max(1 - tau / s, 0)``, without differences that cancel."""
    # With c = max(s, tau) it is tau / (c_i c_j (s_i + s_j)) times (c_i - c_j) / (s_i - s_j). The latter is 1 where both
    # values are kept, 0 where neither is, and at most 1 where one is: there the divisor is not zero.
    raised = torch.where(kept, values, tau)
    lowest = torch.where(kept, values, torch.minimum(values, tau))  # what is below tau stays so where it was made safe
    differences = lowest[:, None] - lowest
    quotient = (raised[:, None] - raised).div_(differences.masked_fill_(differences == 0, 1))
    quotient = torch.where(kept[:, None] & kept, 1, quotient)
    quotient.div_(values[:, None] + values)
    factors = tau.clamp_min(0).sqrt() / raised.clamp_min(torch.finfo(values.dtype).tiny)
    return quotient.mul_(factors[:, None]).mul_(factors)


def _lower_gram(wide: Tensor) -> Tensor:
    """``W @ W.T``, or its lower triangle in blocks with others of zeros: `decompose` reads that triangle alone."""
    rows = wide.shape[0]
    if rows < _BLOCKS_FROM or wide.device.type != "cpu":
        return wide @ wide.mT
    gram = wide.new_zeros(rows, rows)
    for start in range(0, rows, step := -(-rows // 4)):
        block = slice(start, min(start + step, rows))
        gram[block, : block.stop] = _product_of_rows(wide[block], wide[: block.stop])
    return gram


# On processors without Intel's name MKL, which `@` calls, leaves half of their speed unused; oneDNN, which convolutions
# call, does not. With one thread torch calls it for a kernel of width 1 if this is dilated, which changes nothing else.


def _product(square: Tensor, wide: Tensor) -> Tensor:
    """``(m, m) @ (m, n)``."""
    if _by_convolution(square, wide):
        return conv1d(wide[None], square[:, :, None], dilation=2)[0]
    return square @ wide


def _product_of_rows(one: Tensor, other: Tensor) -> Tensor:
    """``(k, n) @ (m, n).T``."""
    if _by_convolution(one, other):
        shape = (one.shape[0], other.shape[0], 1)
        product: Tensor = conv1d_weight(other[None], shape, one[None], dilation=2)[:, :, 0]
        return product
    return one @ other.mT


def _by_convolution(*factors: Tensor) -> bool:
    if any(
        factor.device.type != "cpu" or factor.dtype != torch.float32 or min(factor.shape) < _BY_CONVOLUTION_FROM
        for factor in factors
    ):
        return False
    mkldnn = torch.backends.mkldnn
    return torch.backends.mkl.is_available() and mkldnn.is_available() and bool(mkldnn.enabled)
