"""Smooth surrogates for the rank of a matrix, with closed-form gradients."""

from numbers import Integral
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_plugins._checks import check_positive_int
from lightning_plugins.functional.gram_svd import check_matrices, gram_eigen, unit_scale
from lightning_plugins.functional.products import add_outer_
from lightning_plugins.functional.spectral_sum import spectral_sum
from lightning_plugins.functional.spectrum import at_least_float32, full_precision, smaller_gram, widened_matrices
from lightning_plugins.functional.split_spectrum import head_and_tail, head_masks, root_powers
from lightning_plugins.functional.subspace import top_singular_subspace

Power = Literal[1, 2]


def stable_rank(weight: Tensor) -> Tensor:
    """Squared Frobenius norm over squared spectral norm: the sum of the squared singular values over the largest.

    It is at most the rank, equal to it if all non-zero singular values are equal, and does not depend on the scale of
    the weight. If the two largest singular values coincide, the gradient is that of one of them.

    Args:
        weight: Floating tensor of shape ``(..., m, n)`` with ``m, n >= 1``.

    Returns:
        Tensor of shape ``(...)`` in ``[1, min(m, n)]``, 1 for a matrix of zeros, within about ``10 * eps * min(m, n)``:
        float32 for float16 and bfloat16 input, else the input's dtype. NaN for a matrix with a non-finite value.
        Autocast is disabled. It can be differentiated twice.

    Raises:
        TypeError: If ``weight`` is not a real floating tensor.
        ValueError: If ``weight`` has fewer than two dimensions, no rows or no columns.

    Example:
        >>> stable_rank(torch.diag(torch.tensor([2.0, 2.0, 1.0])))
        tensor(2.2500)
    """
    return 1 + modified_stable_rank(weight, 1, p=2)


def modified_stable_rank(weight: Tensor, rank: int, p: Power = 1) -> Tensor:
    """Ratio of the singular values beyond a target rank to those within it.

    That is the sum of ``s ** p`` over the singular values after the ``rank`` largest, divided by that over the ``rank``
    largest. It is zero exactly where the rank is at most ``rank``, and does not depend on the scale of the weight. With
    ``p=1`` the gradient on a tail singular value does not vanish as it shrinks, so minimising drives the tail to zero.

    With ``p=1``, singular values below ``sqrt(8 * eps)`` of the largest (1e-3 in float32, 4e-8 in float64) are rounding
    errors of the Gram matrix and count as zero, in the value and in the gradient.

    Args:
        weight: Floating tensor of shape ``(..., m, n)`` with ``m, n >= 1``.
        rank: The target rank, at least 1; from ``min(m, n)`` on the value is 0.
        p: 1 or 2.

    Returns:
        Tensor of shape ``(...)``, at least 0 and at most ``min(m, n) / rank - 1``, 0 for a matrix of zeros: float32 for
        float16 and bfloat16 input, else the input's dtype. NaN for a matrix with a non-finite value. Autocast is
        disabled. It can be differentiated twice.

    Raises:
        TypeError: If ``weight`` is not a real floating tensor or ``rank`` not an int.
        ValueError: If ``weight`` does not have the shape described, ``rank`` is less than 1, or ``p`` not 1 or 2.

    Example:
        >>> modified_stable_rank(torch.diag(torch.tensor([3.0, 1.0, 1.0])), rank=2)
        tensor(0.2500)

    Source:
        Our reading of Eo et al., https://arxiv.org/abs/2111.15179: ``p=1`` by default, ``p=2`` beside it.
    """
    check_matrices("weight", weight)
    _check_target(rank, p)
    with full_precision(weight):
        head, tail = head_and_tail(smaller_gram(unit_scale(widened_matrices(weight))[0]), rank, p)
        return tail / head.masked_fill(head == 0, 1)


def nuclear_norm(weight: Tensor) -> Tensor:
    """The sum of the singular values.

    Singular values below ``sqrt(8 * eps)`` of the largest (1e-3 in float32, 4e-8 in float64) are rounding errors of the
    Gram matrix and count as zero; the others are exact to ``eps / x`` for a fraction ``x`` of the largest.

    Args:
        weight: Floating tensor of shape ``(..., m, n)`` with ``m, n >= 1``.

    Returns:
        Tensor of shape ``(...)``: float32 for float16 and bfloat16 input, else the input's dtype. NaN for a matrix with
        a non-finite value. Autocast is disabled. It can be differentiated twice.

    Raises:
        TypeError: If ``weight`` is not a real floating tensor.
        ValueError: If ``weight`` has fewer than two dimensions, no rows or no columns.

    Example:
        >>> nuclear_norm(torch.diag(torch.tensor([3.0, -2.0])))
        tensor(5.)
    """
    check_matrices("weight", weight)
    with full_precision(weight):
        scaled, scale = unit_scale(at_least_float32(weight))
        # The Gram matrix is divided by the number of rows.
        norm: Tensor = spectral_sum(smaller_gram(scaled), power=0.5) * scale[..., 0, 0] * weight.shape[-2] ** 0.5
    return norm


class RankTerm(NamedTuple):
    """A modified stable rank of matrices ``(..., m, n)`` and its gradient.

    Attributes:
        value: Shape ``(...)``.
        gradient: Shape ``(..., m, n)``.
    """

    value: Tensor
    gradient: Tensor


class FollowedRankTerm(NamedTuple):
    """A modified stable rank of matrices ``(..., m, n)``, its gradient in parts, and the tracked vectors.

    The gradient is ``scale * W + left @ right`` if ``m <= n``; else ``left @ right`` is its transpose's part.

    Attributes:
        value: Shape ``(...)``.
        scale: Shape ``(..., 1, 1)``.
        left: Shape ``(..., min(m, n), rank)``.
        right: Shape ``(..., rank, max(m, n))``.
        start: Argument for the next call of `followed_term`.
        error: Estimated relative error of the gradient, shape ``(...)``.
    """

    value: Tensor
    scale: Tensor
    left: Tensor
    right: Tensor
    start: Tensor
    error: Tensor

    def gradient(self, weight: Tensor) -> Tensor:
        """The gradient as one tensor of the shape of ``weight``."""
        return whole_gradient(weight, self.scale, self.left, self.right)


def whole_gradient(weight: Tensor, scale: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The gradient as one tensor from the parts that `FollowedRankTerm` describes.

    Args:
        weight: Tensor of shape ``(..., m, n)``.
        scale: As in `FollowedRankTerm`.
        left: As in `FollowedRankTerm`.
        right: As in `FollowedRankTerm`.

    Returns:
        Tensor of the shape of ``weight``.
    """
    return add_outer_(scale * weight, left, right)


def exact_gradient(weight: Tensor, rank: int, p: Power) -> RankTerm:
    """`modified_stable_rank` and its gradient from one decomposition of the smaller Gram matrix, without autograd.

    Args:
        weight: As for `modified_stable_rank`.
        rank: As for `modified_stable_rank`.
        p: As for `modified_stable_rank`.

    Returns:
        Value and gradient, in float32 or float64.
    """
    check_matrices("weight", weight)
    _check_target(rank, p)
    with torch.no_grad(), full_precision(weight):
        matrix = at_least_float32(weight)
        eigenvalues, vectors, scaled, scale, poison = gram_eigen(matrix, vectors=True)
        of_head, of_tail = head_masks(eigenvalues, rank)
        powers, slopes = root_powers(eigenvalues, p)
        head, tail = (powers * of_head).sum(-1), (powers * of_tail).sum(-1)
        least = head.masked_fill(head == 0, 1)
        coefficients = (slopes * (of_tail - of_head * (tail / least)[..., None])) / least[..., None]
        middle = (vectors * (coefficients * 2 / matrix.shape[-2])[..., None, :]) @ vectors.mT
        gradient = middle @ scaled if matrix.shape[-2] <= matrix.shape[-1] else scaled @ middle
        return RankTerm(tail / least + poison, gradient.div_(scale) + poison[..., None, None])


def followed_term(weight: Tensor, rank: int, start: Tensor) -> FollowedRankTerm:
    """`modified_stable_rank` with ``p=2`` and its gradient from tracked singular vectors, by products with the weight.

    The accuracy is that of `top_singular_subspace` with ``start``. In float32, absolute entries are assumed to be
    between 1e-15 and 1e15, since they are squared without scaling.

    Args:
        weight: As for `modified_stable_rank`.
        rank: As for `modified_stable_rank`, less than ``min(m, n)``.
        start: Orthonormal columns of shape ``(..., min(m, n), k)`` with ``k >= rank``, as `top_singular_subspace`
            returns them.

    Returns:
        Value, gradient and the next ``start``; 0 and zeros for a matrix of zeros.
    """
    _check_target(rank, 2)
    with torch.no_grad(), full_precision(weight):
        matrix = at_least_float32(weight)
        found = top_singular_subspace(matrix, start.shape[-1], start=start, leading=rank)
        head = found.values.square().sum(-1)
        inverse = 1 / head.masked_fill(head == 0, torch.inf)
        share = torch.linalg.matrix_norm(matrix).square() * inverse  # total over head: that of the tail plus 1
        scale = 2 * inverse[..., None, None]
        left = found.basis * (-scale * share[..., None, None])
        value = (share - 1).clamp_min(0)
        # Rotating vector i by an angle changes the head's part by the angle times s_i in two directions.
        moved = (found.angles * found.values).square().sum(-1) * 2 * share
        length = (value * head).masked_fill(value * head == 0, torch.inf)
        return FollowedRankTerm(value, scale, left, found.rows, found.start, (moved / length).sqrt())


def check_power(p: Power) -> Power:
    """Return ``p`` if it is 1 or 2; raise `ValueError` otherwise."""
    if isinstance(p, bool) or not isinstance(p, int | Integral) or p not in {1, 2}:
        raise ValueError(f"`p` must be 1 or 2, got {p!r}")
    return 1 if p == 1 else 2


def _check_target(rank: int, p: Power) -> None:
    check_positive_int("rank", rank)
    check_power(p)
