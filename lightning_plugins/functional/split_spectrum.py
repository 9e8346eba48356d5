"""Sums of powers of the leading singular values and of the others, with closed-form first and second derivatives."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_plugins.functional.derivatives import last_derivative
from lightning_plugins.functional.spectrum import decompose, finite_or_zero, full_precision


def head_and_tail(gram: Tensor, rank: int, p: int) -> tuple[Tensor, Tensor]:
    """Sum ``x ** (p / 2)`` over the ``rank`` largest eigenvalues ``x`` of a Gram matrix, and over the others.

    Args:
        gram: Symmetric positive semidefinite tensor of shape ``(..., n, n)``, float32 or float64.
        rank: Number of eigenvalues in the head, at least 1.
        p: 1 or 2; with 1, eigenvalues below ``8 * eps`` of the largest count as zero.

    Returns:
        Two tensors of shape ``(...)``; NaN for a matrix with a non-finite value. They can be differentiated twice.

    Example:
        >>> head_and_tail(torch.diag(torch.tensor([1.0, 4.0, 9.0])), 2, 1)
        (tensor(5.), tensor(1.))
    """
    # `requires_grad` is unreliable under `torch.func.vmap`: there the backward pass decomposes again.
    vectors = torch.is_grad_enabled() and gram.requires_grad
    with full_precision(gram):
        head, tail, *_ = _HeadTail.apply(gram, rank, p, vectors)
    return head, tail


def head_masks(eigenvalues: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Indicators of the head and of the tail, for eigenvalues in ascending order."""
    position = torch.arange(eigenvalues.shape[-1], 0, -1, device=eigenvalues.device)
    head = (position <= rank).to(eigenvalues.dtype)
    return head, 1 - head


def root_powers(eigenvalues: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """``x ** (p / 2)`` of the eigenvalues and its derivative; both are zero for rounding errors if ``p`` is 1."""
    x = eigenvalues.clamp_min(0)
    if p == 2:
        return x, torch.ones_like(x)
    small = x <= (8 * torch.finfo(x.dtype).eps * x[..., -1:]).clamp_min(torch.finfo(x.dtype).tiny)
    return x.sqrt().masked_fill(small, 0), 0.5 * x.masked_fill(small, torch.inf).rsqrt()


class _HeadTail(Function):
    """The sums over head and tail as functions of the Gram matrix."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, rank: int, p: int, vectors: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        safe, poison = finite_or_zero(matrix)
        eigenvalues, eigenvectors = decompose(safe, vectors=vectors)
        of_head, of_tail = head_masks(eigenvalues, rank)
        powers, _ = root_powers(eigenvalues, p)
        head, tail = (powers * of_head).sum(-1) + poison, (powers * of_tail).sum(-1) + poison
        return head, tail, eigenvalues, eigenvectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int, bool], output: tuple[Tensor, ...]) -> None:
        matrix, ctx.rank, ctx.p, ctx.vectors = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(matrix, *output[2:])

    @staticmethod
    def backward(ctx: Any, grad_head: Tensor, grad_tail: Tensor, *_: None) -> tuple[Tensor, None, None, None]:
        matrix, eigenvalues, eigenvectors = ctx.saved_tensors
        with full_precision(matrix):
            if not ctx.vectors:
                eigenvalues, eigenvectors = decompose(finite_or_zero(matrix.detach())[0], vectors=True)
            slopes: Tensor = _Slopes.apply(matrix, grad_head, grad_tail, eigenvalues, eigenvectors, ctx.rank, ctx.p)
        return slopes, None, None, None


class _Slopes(Function):
    """The gradient ``V diag(c f'(x)) V.T`` with ``c`` the incoming gradient of the head's or the tail's sum.

    Its backward is the formula of Daleckii and Krein. The map is discontinuous between the head and the tail, so the
    quotient diverges as their eigenvalues meet; pairs closer than rounding errors are dropped.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        matrix: Tensor, grad_head: Tensor, grad_tail: Tensor, x: Tensor, vectors: Tensor, rank: int, p: int
    ) -> Tensor:
        of_head, of_tail = head_masks(x, rank)
        chosen = grad_head[..., None] * of_head + grad_tail[..., None] * of_tail
        return (vectors * (chosen * root_powers(x, p)[1])[..., None, :]) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.rank, ctx.p = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @last_derivative  # eigenvalues and eigenvectors have no graph: a third derivative would be silently wrong
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, grad_head, grad_tail, x, vectors = ctx.saved_tensors
        of_head, of_tail = head_masks(x, ctx.rank)
        with full_precision(vectors):
            inside = vectors.mT @ ((grad + grad.mT) / 2) @ vectors
            powers, slopes = root_powers(x, ctx.p)
            chosen = grad_head[..., None] * of_head + grad_tail[..., None] * of_tail
            diagonal = inside.diagonal(dim1=-2, dim2=-1) * slopes
            quotients = _quotients(x, powers, slopes, chosen, ctx.p)
            matrix = vectors @ (inside * quotients) @ vectors.mT
            return matrix, (diagonal * of_head).sum(-1), (diagonal * of_tail).sum(-1), None, None, None, None


def _quotients(x: Tensor, powers: Tensor, slopes: Tensor, chosen: Tensor, p: int) -> Tensor:
    """``(h_i - h_j) / (x_i - x_j)`` for ``h = c f'(x)``, and ``h'`` on the diagonal."""
    weighted = chosen * slopes
    same = chosen[..., None] == chosen[..., None, :]
    gap = x[..., None] - x[..., None, :]
    close = gap.abs() <= 8 * torch.finfo(x.dtype).eps * x[..., -1:, None]
    across = (weighted[..., None] - weighted[..., None, :]) / gap.masked_fill(close, torch.inf)
    if p == 2:
        return across.masked_fill(same, 0)
    product = powers[..., None] * powers[..., None, :] * (powers[..., None] + powers[..., None, :])
    within = -0.5 * chosen[..., None] / product.masked_fill(product == 0, torch.inf)
    both = product > 0
    return torch.where(same & both, within, across)
