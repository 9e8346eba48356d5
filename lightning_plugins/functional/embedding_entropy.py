"""The von Neumann entropy of embeddings as a single autograd node, which saves time and memory over several."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_plugins.functional.matrix_log import known_log, log_by_products
from lightning_plugins.functional.spectral_sum import floored_log, known_slope, matrix_from, sum_over
from lightning_plugins.functional.spectrum import (
    decompose,
    differentiable_rows,
    finite_or_zero,
    full_precision,
    gram,
    keep_signature,
    rows_and_lengths,
    smaller_gram,
)


def embedding_entropy(embeddings: Tensor, *, products: bool) -> Tensor:
    """``-trace(C @ log(C))`` with ``C`` the smaller Gram matrix of the rows of ``(..., N, d)``; shape ``(...)``."""
    # `requires_grad` is unreliable under `torch.func.vmap`: there the backward pass decomposes again.
    vectors = torch.is_grad_enabled() and embeddings.requires_grad
    value: Tensor
    if torch._C._are_functorch_transforms_active():
        value = _EmbeddingEntropy.apply(embeddings, products, vectors)[0]
    else:
        value = _PlainEmbeddingEntropy.apply(embeddings, products, vectors)
    return value


class _EmbeddingEntropy(Function):
    generate_vmap_rule = True

    @staticmethod
    @keep_signature
    def forward(embeddings: Tensor, products: bool, vectors: bool) -> tuple[Tensor, ...]:
        rows, length = rows_and_lengths(embeddings)
        if products:
            matrix = gram(rows)
            log = log_by_products(matrix)
            return -(matrix * log).sum((-2, -1)), rows, length, log, log.new_empty(0)
        matrix, poison = finite_or_zero(gram(rows))
        eigenvalues, eigenvectors = decompose(matrix, vectors=vectors, overwrite=True)
        return poison - sum_over(eigenvalues, 1.0, True), rows, length, eigenvalues, eigenvectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool, bool], output: tuple[Tensor, ...]) -> None:
        embeddings, ctx.products, ctx.vectors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(embeddings, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        embeddings, rows, length, first, second = ctx.saved_tensors
        with full_precision(embeddings):
            if not ctx.products and not ctx.vectors:
                first, second = decompose(finite_or_zero(gram(rows))[0], vectors=True)
            if torch.is_grad_enabled():  # recomputed with differentiable operations
                rows, length = differentiable_rows(embeddings)
                matrix = smaller_gram(rows)
                log = known_log(matrix, first) if ctx.products else known_slope(matrix, first, second, logarithm=True)
            elif ctx.products:
                log = first
            else:
                logs = floored_log(first)
                log = matrix_from(logs, second)
                if rows.shape[-2] <= rows.shape[-1]:
                    # The component along each row, which `_gradient` subtracts, from the spectrum: no other large
                    # tensor is needed.
                    along = second.square() @ (first * logs)[..., None] * rows.shape[-2]
                    log.diagonal(dim1=-2, dim2=-1).sub_(along[..., 0])
                    return (log * _factor(grad[..., None, None], length)) @ rows, None, None
            return _gradient(grad[..., None, None], rows, length, log), None, None


class _PlainEmbeddingEntropy(Function):
    """The same without support for ``torch.func``, which takes a tenth of the time on small batches."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, products: bool, vectors: bool) -> Tensor:
        value, *kept = _EmbeddingEntropy.forward(embeddings, products, vectors)
        ctx.products, ctx.vectors = products, vectors
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(embeddings, *kept)
        return value

    backward = staticmethod(_EmbeddingEntropy.backward)


def _gradient(grad: Tensor, rows: Tensor, length: Tensor, log: Tensor) -> Tensor:
    """``-(2 / N) Z log(C)`` minus its component along each row, propagated through the row scaling."""
    # A multiple of the identity in `log` has no effect: its contribution is along each row.
    result = log @ rows if rows.shape[-2] <= rows.shape[-1] else rows @ log
    along = (rows * result).sum(-1, keepdim=True)
    across, factor = torch.addcmul(result, rows, along, value=-1), _factor(grad, length)
    return across * factor if torch.is_grad_enabled() else across.mul_(factor)


def _factor(grad: Tensor, length: Tensor) -> Tensor:
    return grad * (-2 / length.shape[-2]) / length
