"""Gradients with rescaled singular values: the preconditioner of GAP, exact and approximate."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_plugins._checks import check_bool, check_choice, check_positive_int
from lightning_plugins.functional.derivatives import refuse_derivatives
from lightning_plugins.functional.gram_svd import GramSVD, svd_from_left, unit_scale
from lightning_plugins.functional.spectrum import at_least_float32, finite_or_zero, full_precision
from lightning_plugins.functional.tensors import check_floating

Derivative = Literal["constant", "exact"]

_TIE = 1e-3  # relative to the sum of two singular values: closer ones are treated as equal in the exact derivative
_PRIME = 2**31 - 1


def gap_precondition(
    gradient: Tensor,
    gains: Tensor,
    *,
    approximate: bool = False,
    derivative: Derivative = "constant",
    rank: int | None = None,
) -> Tensor:
    """Multiply the singular values of a gradient by gains; the first gain applies to the largest singular value.

    With the decomposition ``G = U @ diag(s) @ V.T`` the result is ``U @ diag(gains * s) @ V.T``, from one
    eigendecomposition of the smaller Gram matrix. Gains of one return the gradient itself. Since gains are assigned by
    the order of the singular values, the result is discontinuous where two of them with different gains cross.

    Meta-learning needs the derivative of the result, which has two forms:

    * ``"constant"``: singular vectors are treated as constants, as in the published update ``P @ G`` with
      ``P = U @ diag(gains) @ U.T``. If ``m > n``, ``P`` has rank at most ``n``, and changes of ``G`` outside the span
      of ``U`` are lost, even with gains of one.
    * ``"exact"``: the exact derivative, in divided differences. Two singular values that differ by less than a
      thousandth of their sum are treated as equal, which drops the term that diverges at the discontinuity.

    With respect to the gains both are equal. They are finite for equal and for vanishing singular values.

    Args:
        gradient: Floating tensor of shape ``(..., m, n)`` with ``m, n >= 1``: gradients of tasks or layers of equal
            shape. Pass a convolution's kernel as ``(out, in * height * width)``.
        gains: Floating tensor of shape ``(min(m, n),)``, or ``(..., min(m, n))`` that broadcasts with the gradient.
        approximate: Multiply the rows by the gains if ``m <= n``, else the columns, without a decomposition;
            ``derivative`` is ignored.
        derivative: ``"constant"`` or ``"exact"``.
        rank: An upper bound on the matrices' rank, if known, which is then the size of the decomposition. For a linear
            layer called once, on ``(samples, features)``, it is at most the number of samples. Gains beyond the bound
            are ignored. For matrices of higher rank, the part outside the span of the first ``rank`` singular vectors
            of a random projection is unchanged.

    Returns:
        Tensor of shape ``(..., m, n)``: float32 for float16 and bfloat16 gradients, else the gradient's dtype. Autocast
        is off inside, and the decomposition in float64. Singular values that differ by less than about ``eps`` of the
        largest may exchange their gains. Non-finite for a matrix with a non-finite value. It can be differentiated
        once, and for ``approximate`` any number of times.

    Raises:
        TypeError: If ``gradient`` or ``gains`` is not a real floating tensor, ``derivative`` not a string, or ``rank``
            no int.
        ValueError: If ``gradient`` or ``gains`` does not have the shape described, ``derivative`` is unknown, or
            ``rank`` less than 1.

    Example:
        >>> gap_precondition(torch.diag(torch.tensor([1.0, 3.0])), torch.tensor([2.0, 0.5]))
        tensor([[0.5000, 0.0000],
                [0.0000, 6.0000]])

    Source:
        Kang et al., CVPR 2023, https://arxiv.org/abs/2304.01552. The authors' code decomposes the gradient itself; the
        exact derivative is ours.
    """
    check_bool("approximate", approximate)
    _check_shapes(gradient, gains)
    check_choice("derivative", derivative, get_args(Derivative))
    if rank is not None:
        check_positive_int("rank", rank)
    with full_precision(gradient):
        matrix = at_least_float32(gradient)
        gains = gains.to(matrix.dtype)
        turned = matrix.shape[-2] > matrix.shape[-1]
        if approximate:
            return matrix * (gains[..., None, :] if turned else gains[..., None])
        batch = torch.broadcast_shapes(matrix.shape[:-2], gains.shape[:-1])
        matrix = matrix.expand(*batch, *matrix.shape[-2:])
        wide = matrix.mT if turned else matrix
        size = min(rank or wide.shape[-2], wide.shape[-2])
        gains = gains.expand(*batch, wide.shape[-2])[..., :size]
        if wide.shape[-2] == 1 and (derivative == "exact" or not turned):
            return matrix * gains[..., None]  # a single singular value: a multiple of the matrix
        result: Tensor = _Precondition.apply(wide, gains, turned, derivative == "exact")[0]
    return result.mT if turned else result


def _check_shapes(gradient: Tensor, gains: Tensor) -> None:
    check_floating("gradient", gradient)
    check_floating("gains", gains)
    shape = tuple(gradient.shape)
    if len(shape) < 2 or 0 in shape[-2:]:
        raise ValueError(
            f"`gradient` must have shape (..., m, n) with at least one row and one column, got {shape};"
            " a convolution's kernel is `gradient.flatten(1)`, the gradient of a bias takes no gains"
        )
    least = min(shape[-2:])
    if gains.ndim == 0 or gains.shape[-1] != least:
        raise ValueError(f"`gains` must have shape (..., {least}) for matrices {shape[-2:]}, got {tuple(gains.shape)}")
    if any(a != b and 1 not in {a, b} for a, b in zip(reversed(shape[:-2]), reversed(gains.shape[:-1]), strict=False)):
        raise ValueError(f"`gains` must broadcast with a gradient {shape}, got {tuple(gains.shape)}")


class _Precondition(Function):
    """Matrices with at most as many rows as columns; ``turned`` if they are transposed gradients."""

    @staticmethod
    def forward(matrix: Tensor, gains: Tensor, turned: bool, exact: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        left, values, rows, right, poison = _decompose(matrix, gains.shape[-1])
        # As a change of the matrix: gains of one are the identity without rounding.
        return matrix + left @ ((gains - 1)[..., None] * rows) + poison[..., None, None], left, values, right

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool, bool], output: tuple[Tensor, ...]) -> None:
        matrix, gains, ctx.turned, ctx.exact = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(matrix, gains, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        matrix, gains, left, values, right = ctx.saved_tensors
        with torch.no_grad(), full_precision(left):
            inside = left.mT @ grad
            projected = inside @ right.mT
            if ctx.exact:  # as a change of the gradient: `left` need not be square
                change = _weighted(projected, gains - 1, values) @ right
                change = change + (gains - 1)[..., None] * (inside - projected @ right)
                outside = grad @ right.mT - left @ projected
                grad_matrix = grad + left @ change + outside @ ((gains - 1)[..., None] * right)
            elif ctx.turned:  # the gradient's left singular vectors are the rows of `right`
                grad_matrix = (grad @ right.mT) @ (gains[..., None] * right)
            else:
                grad_matrix = grad + left @ ((gains - 1)[..., None] * inside)
            results = (grad_matrix, projected.diagonal(dim1=-2, dim2=-1) * values)
        return *refuse_derivatives(results, (grad, matrix, gains), "`gap_precondition`: the gradient"), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], matrix: Tensor, gains: Tensor, turned: bool, exact: bool
    ) -> tuple[tuple[Tensor, ...], int]:
        """Everything is already batched: a rule generated by torch would cost more than the small matrices."""
        matrix, gains = (
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip((matrix, gains), in_dims, strict=False)
        )
        return _Precondition.apply(matrix, gains, turned, exact), 0


def _decompose(matrix: Tensor, rank: int) -> GramSVD:
    """Thin singular value decomposition of wide matrices of bounded rank, largest values first."""
    scaled, scale = unit_scale(matrix)
    scaled, poison = finite_or_zero(scaled)
    return svd_from_left(scaled, scale, _left_vectors(scaled, rank), poison)


def _left_vectors(matrix: Tensor, rank: int) -> Tensor:
    """The first left singular vectors: eigenvectors of the Gram matrix, largest eigenvalue first."""
    # In float64: the Gram matrix squares the singular values. Besides, on matrices with rows of zeros, as from dead
    # units, the float32 decomposition (of MKL at least) occasionally fails to converge or returns NaN.
    exact = matrix if matrix.device.type == "mps" else matrix.double()  # which has no float64
    if rank == matrix.shape[-2]:
        whole: Tensor = torch.linalg.eigh(exact @ exact.mT)[1]
        return whole.flip(-1).to(matrix.dtype)
    # Random combinations of the columns span them, if they have that rank.
    basis = torch.linalg.qr(exact @ _directions(matrix.shape[-1], rank, exact))[0]
    inside = basis.mT @ exact
    vectors: Tensor = basis @ torch.linalg.eigh(inside @ inside.mT)[1]
    return vectors.flip(-1).to(matrix.dtype)


def _directions(rows: int, columns: int, like: Tensor) -> Tensor:
    """Fixed pseudo-random numbers, without a generator, which ``vmap`` does not support."""
    count = torch.arange(1, rows * columns + 1, device=like.device)
    scattered = (count * count % _PRIME * 1103515245) % _PRIME
    return (scattered / _PRIME - 0.5).to(like.dtype).reshape(rows, columns)


def _weighted(projected: Tensor, gains: Tensor, values: Tensor) -> Tensor:
    """The core of the exact derivative, from ``U.T @ grad @ V``."""
    # With f = gains * s, the symmetric part is weighted by (f_i - f_j) / (s_i - s_j) and the skew part by (f_i + f_j) /
    # (s_i + s_j). Both are the mean of the two gains plus a term in their difference, which vanishes on the diagonal.
    mean = (gains[..., None] + gains[..., None, :]) / 2
    half = (gains[..., None] - gains[..., None, :]) / 2
    gap = values[..., None] - values[..., None, :]
    total = values[..., None] + values[..., None, :]
    symmetric = half * (total / gap.masked_fill(gap.abs() <= _TIE * total, torch.inf))
    skew = half * (gap / total.masked_fill(total == 0, torch.inf))
    return (mean + (symmetric + skew) / 2) * projected + (symmetric - skew) / 2 * projected.mT
