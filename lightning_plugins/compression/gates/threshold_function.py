"""The map from a weight to itself with lower singular values, its gradient, and their products."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import conv1d
from torch.nn.grad import conv1d_weight

from lightning_plugins.functional.derivatives import last_derivative
from lightning_plugins.functional.followed_eigen import follow_eigenvectors
from lightning_plugins.functional.spectrum import decompose, finite_or_zero, full_precision

_BY_CONVOLUTION_FROM = 128
_BLOCKS_FROM = 256
_PASSES = 2  # of following a basis: with one the weight is off by some percent while many masks of a layer close fast


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


def decompose_wide(wide: Tensor, scale: Tensor | None = None) -> Basis:
    """Singular values and left singular vectors, from the eigendecomposition of ``M @ M.T``.

    Unlike `functional.gram_svd` it multiplies masks into the small matrix, not into the weight, computes half of that
    matrix where this is faster, and needs no right vectors.

    Args:
        wide: Matrix ``W`` of shape ``(m, n)``.
        scale: What multiplies its rows, ``M = diag(scale) @ W``.

    Returns:
        The basis.
    """
    with torch.inference_mode(mode=False), torch.no_grad():  # one made in validation serves training too
        gram = _lower_gram(wide)
        gram, poison = finite_or_zero(gram if scale is None else gram.mul_(scale[:, None]).mul_(scale))
        squares, vectors = decompose(gram, vectors=True, overwrite=True)
        return Basis(vectors, squares.clamp_min(0).sqrt(), poison)


def follow_wide(grams: Tensor, vectors: Tensor) -> Basis:
    """Singular values and left singular vectors of matrices from those of a step before, by products alone.

    Args:
        grams: ``M @ M.T`` of every matrix, ``(b, m, m)``.
        vectors: What the vectors were, ``(b, m, m)``.

    Returns:
        The bases of all.
    """
    grams, poison = finite_or_zero(grams)
    squares, vectors = follow_eigenvectors(grams, vectors, passes=_PASSES)
    return Basis(vectors, squares.clamp_min(0).sqrt(), poison)


class Lowering(NamedTuple):
    """``Q = U diag(max(1 - tau / s, 0)) U.T``, what the threshold subtracts, and the divided differences of ``Q``.

    Attributes:
        matrix: ``Q``.
        slope: The derivative of ``Q`` with respect to the threshold in its own unit.
        tau: The threshold in the unit of the singular values.
        differences: ``C`` of `Lower`; None where the backward pass computes it.
    """

    matrix: Tensor
    slope: Tensor
    tau: Tensor
    differences: Tensor | None = None


def lowering(basis: Basis, tau: Tensor, unit: Tensor, *, differences: bool = False) -> Lowering:
    """The matrix that lowers the singular values of the decomposed weight; of a batch of them with leading dimensions.

    Args:
        basis: The decomposition.
        tau: The threshold.
        unit: The unit of the threshold.
        differences: Whether to compute the divided differences, too.

    Returns:
        It, and its derivatives.
    """
    vectors, values, poison = basis
    with torch.inference_mode(mode=False), torch.no_grad():
        level = tau[..., None]
        kept = _kept(values, level)
        factors = torch.where(kept, 1 - level / torch.where(kept & (level > 0), values, 1), 0) + poison[..., None]
        slopes = torch.where(kept, -unit[..., None] / _safe(values), 0)
        matrix, slope = (_product(vectors * each[..., None, :], vectors.mT) for each in (factors, slopes))
        return Lowering(matrix, slope, tau, _slopes(_safe(values), level, kept) if differences else None)


class Lower(Function):
    """``Q @ M`` with ``M = diag(scale) @ W``, where ``Q`` is made from a decomposition of ``M @ M.T``.

    The gradient with respect to ``M`` is ``Q @ G + A @ M`` with ``A = U (C * (P + P.T)) U.T``, where
    ``P = U.T @ G @ M.T @ U`` and ``C`` are the divided differences of ``Q``'s eigenvalues as a function of those of
    ``M @ M.T``. It is that of singular value thresholding, without a matrix of the size of ``V``. A ``Q`` that is held
    from an earlier step is a constant, and ``Q @ G`` the gradient of what is computed; ``A @ M`` is then taken
    ``every`` times as strong in the step with the decomposition, of ``age`` 0. Without that, singular values near the
    threshold, whose part of ``Q @ G`` is small, sink below it. The gradient with respect to ``tau`` is that of ``Q`` in
    every step; each of the ``every - 1`` held steps takes it from a part of the columns.
    """

    @staticmethod
    def forward(
        ctx: Any,
        wide: Tensor,
        scale: Tensor | None,
        value: Tensor,
        basis: Basis,
        lowered: Lowering,
        age: int,
        every: int,
    ) -> Tensor:
        """Return ``lowered.matrix @ diag(scale) @ wide``; ``value`` is the threshold in its own unit."""
        ctx.save_for_backward(wide, scale, value)
        ctx.basis, ctx.lowered, ctx.age, ctx.every = basis, lowered, age, every
        matrix = lowered.matrix
        return _product(matrix if scale is None else matrix * scale, wide)

    @staticmethod
    @last_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``wide``, ``scale`` and ``value``."""
        wide, scale, value = ctx.saved_tensors
        vectors, values, _ = ctx.basis
        lowered = ctx.lowered
        with full_precision(wide):
            some = slice(ctx.age - 1, None, max(ctx.every - 1, 1)) if ctx.age else slice(0, None, 1)
            inner = _product_of_rows(grad[:, some], wide[:, some])
            if scale is not None:
                inner *= scale
            of_value = torch.dot(lowered.slope.reshape(-1), inner.reshape(-1)).to(value.dtype)
            of_value = of_value if some.step == 1 else of_value.mul_(some.step)
            of_wide = _product(lowered.matrix, grad)
            if not ctx.age:
                core = _product(_product(vectors.mT, inner + inner.mT), vectors)
                tau, differences = lowered.tau, lowered.differences
                core *= _slopes(_safe(values), tau, _kept(values, tau)) if differences is None else differences
                through = _product(_product(vectors, core), vectors.mT)
                of_wide = _add_product(of_wide, through if scale is None else through.mul_(scale), wide, ctx.every)
            if scale is None:
                return of_wide, None, of_value, None, None, None, None
            of_scale = (of_wide * wide).sum(1) if ctx.needs_input_grad[1] else None
            return of_wide.mul_(scale[:, None]), of_scale, of_value, None, None, None, None


class Values(Function):
    """The singular values of a decomposition of ``M @ M.T`` with ``M = diag(scale) @ W`` as a function of ``W``."""

    @staticmethod
    def forward(ctx: Any, wide: Tensor, scale: Tensor | None, vectors: Tensor, values: Tensor) -> Tensor:
        """Return the singular values."""
        ctx.save_for_backward(wide, scale, vectors, values)
        return values.clone()

    @staticmethod
    @last_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of ``wide``."""
        wide, scale, vectors, values = ctx.saved_tensors
        with full_precision(wide):
            rows = vectors if scale is None else vectors * scale[:, None]
            return _product((rows * (grad / _safe(values))) @ rows.mT, wide), None, None, None


def without_noise(values: Tensor) -> Tensor:
    """Return singular values, with zeros for those below the root of the rounding error of their Gram matrix.

    A matrix with rows that a mask has closed has as many singular values of zero. What a decomposition gives for them
    is noise, of which some would pass a threshold of zero, and which ones differs from machine to machine.
    """
    return torch.where(values > noise_of(values.amax()), values, 0)


def noise_of(largest: Tensor) -> Tensor:
    """Return what counts as zero beside a largest singular value."""
    # Eigenvalues of zero come out as several roundings of the largest one, hardly ever as less than one.
    noise: Tensor = 4 * torch.finfo(largest.dtype).eps ** 0.5 * largest
    return noise


def _safe(values: Tensor) -> Tensor:
    """Singular values to divide by, none of them below their noise."""
    least = noise_of(values.amax(-1, keepdim=True))
    return torch.maximum(values, least).clamp_min(torch.finfo(values.dtype).tiny ** 0.25)


def _kept(values: Tensor, tau: Tensor) -> Tensor:
    """Return which singular values are above the threshold; without threshold all are."""
    return (values > tau) | (tau <= 0)


def _slopes(values: Tensor, tau: Tensor, kept: Tensor) -> Tensor:
    """``(q_i - q_j) / (s_i ** 2 - s_j ** 2)`` with ``q = max(1 - tau / s, 0)``, without differences that cancel."""
    # With c = max(s, tau) it is tau / (c_i c_j (s_i + s_j)) times (c_i - c_j) / (s_i - s_j). The latter is 1 where both
    # values are kept, 0 where neither is, and at most 1 where one is: there the divisor is not zero.
    raised = torch.where(kept, values, tau)
    lowest = torch.where(kept, values, torch.minimum(values, tau))  # values below tau stay below after clamping
    differences = lowest[..., None] - lowest[..., None, :]
    quotient = (raised[..., None] - raised[..., None, :]).div_(differences.masked_fill_(differences == 0, 1))
    quotient = torch.where(kept[..., None] & kept[..., None, :], 1, quotient)
    quotient.div_(values[..., None] + values[..., None, :])
    factors = tau.clamp_min(0).sqrt() / raised.clamp_min(torch.finfo(values.dtype).tiny)
    return quotient.mul_(factors[..., None]).mul_(factors[..., None, :])


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


def _add_product(base: Tensor, square: Tensor, wide: Tensor, times: int) -> Tensor:
    """``base + times * square @ wide``, in place."""
    if _by_convolution(square, wide):
        return base.add_(_product(square, wide), alpha=times)
    return base.addmm_(square, wide, alpha=times)


def _product_of_rows(one: Tensor, other: Tensor) -> Tensor:
    """``(k, n) @ (m, n).T``."""
    if _by_convolution(one, other):
        shape = (one.shape[0], other.shape[0], 1)
        product: Tensor = conv1d_weight(other[None], shape, one[None], dilation=2)[:, :, 0]
        return product
    return one @ other.mT


def _by_convolution(*factors: Tensor) -> bool:
    if any(
        factor.ndim > 2
        or factor.device.type != "cpu"
        or factor.dtype != torch.float32
        or min(factor.shape) < _BY_CONVOLUTION_FROM
        for factor in factors
    ):
        return False
    mkldnn = torch.backends.mkldnn
    return torch.backends.mkl.is_available() and mkldnn.is_available() and bool(mkldnn.enabled)
