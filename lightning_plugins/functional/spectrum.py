"""Rows of unit length, the smaller Gram matrix, and its eigenvalues."""

import inspect
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_plugins.functional.tensors import check_floating

Forward = TypeVar("Forward", bound=Callable[..., Any])


def normalize_rows(embeddings: Tensor) -> Tensor:
    """Scale every row to unit length, whatever its scale; zero rows stay zero.

    Unlike ``x / x.norm().clamp_min(eps)``, no row overflows or underflows, and an all-zero row has a gradient of
    exactly zero instead of ``1 / eps``. A row whose largest entry is subnormal in its own dtype counts as all-zero: its
    gradient would be infinite in that dtype.

    Args:
        embeddings: Floating tensor of shape ``(..., d)``.

    Returns:
        Tensor of the same shape: float32 for float16 and bfloat16 input, else the input's dtype. Autocast is disabled.

    Raises:
        TypeError: If ``embeddings`` is not a real floating tensor.

    Example:
        >>> normalize_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    check_floating("embeddings", embeddings)
    with full_precision(embeddings):
        return differentiable_rows(widened(embeddings))[0]


def autocorrelation_eigenvalues(embeddings: Tensor) -> Tensor:
    """Eigenvalues of the autocorrelation matrix of the embeddings, largest first.

    With ``Z`` the rows scaled to unit length, these are the ``min(N, d)`` largest eigenvalues of ``Z.T @ Z / N`` (the
    others are zero). They are non-negative and sum to 1 minus the fraction of all-zero rows. No mean is subtracted.

    Args:
        embeddings: Floating tensor of shape ``(..., N, d)`` with ``N >= 1`` and ``d >= 1``.

    Returns:
        Tensor of shape ``(..., min(N, d))``, without gradient: float32 for float16 and bfloat16 input, else the input's
        dtype. NaN for a matrix with a non-finite value.

    Raises:
        TypeError: If ``embeddings`` is not a real floating tensor.
        ValueError: If ``embeddings`` has fewer than two dimensions, no rows or no columns.

    Example:
        >>> autocorrelation_eigenvalues(torch.tensor([[2.0, 0.0], [5.0, 0.0], [0.0, 3.0], [0.0, 0.1]]))
        tensor([0.5000, 0.5000])
    """
    check_embeddings(embeddings)
    with torch.no_grad(), full_precision(embeddings):
        safe, poison = finite_or_zero(smaller_gram(normalize_rows(exact_rows(embeddings))))
        eigenvalues: Tensor = decompose(safe, vectors=False)[0].clamp_min(0).flip(-1) + poison[..., None]
    return as_wide(eigenvalues, embeddings)


def smaller_gram(rows: Tensor) -> Tensor:
    """``Z @ Z.T / N`` if ``N <= d``, else ``Z.T @ Z / N``: both have the same non-zero eigenvalues."""
    matrix: Tensor = _SmallerGram.apply(rows)
    return matrix


def differentiable_rows(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of unit length and, with shape ``(..., N, 1)``, their lengths: infinite for a zero row."""
    rows, length = _NormalizeRows.apply(embeddings)
    return rows, length


def rows_and_lengths(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """The values of ``differentiable_rows``, for functions with their own gradient."""
    # Two reductions instead of `abs().amax()`: they need no second tensor of this size.
    largest = torch.maximum(embeddings.amax(-1, keepdim=True), -embeddings.amin(-1, keepdim=True))
    # Division by infinity gives zero for a zero row, and for its gradient.
    largest = largest.masked_fill(largest < torch.finfo(largest.dtype).tiny, torch.inf)
    rows = embeddings / largest
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(1)  # below 1 only if the row is zero
    return rows.div_(length), length * largest


def gram(rows: Tensor) -> Tensor:
    """The values of ``smaller_gram``, for functions with their own gradient."""
    n, d = rows.shape[-2:]
    return symmetric_product(rows, rows).div_(n) if n <= d else symmetric_product(rows.mT, rows.mT).div_(n)


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.mT`` if known to be symmetric: large products on the CPU need 5/8 of the multiplications."""
    n, inner = left.shape[-2:]
    if left.is_cuda or n * n * inner < 2**24:  # otherwise copies, or on a GPU additional kernels, cost more
        return left @ right.mT
    product = left.new_empty(*left.shape[:-1], n)
    for low, high in itertools.pairwise((0, n // 4, n // 2, 3 * n // 4, n)):
        product[..., low:high, :high] = left[..., low:high, :] @ right[..., :high, :].mT
        product[..., :low, low:high] = product[..., low:high, :low].mT
    return product


def finite_or_zero(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Replace NaN and infinity by zeros, which LAPACK accepts.

    Returns:
        The matrices ``(..., n, n)``, and for each a number ``(...)`` to add to results: 0 or NaN.
    """
    poison = matrix.detach().sum(dim=(-2, -1)) * 0
    return torch.nan_to_num(matrix, nan=0.0, posinf=0.0, neginf=0.0), poison


def decompose(matrix: Tensor, *, vectors: bool, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """Eigenvalues of symmetric positive semidefinite matrices, smallest first, and eigenvectors.

    LAPACK's float32 routine (MKL's at least) returns NaN, or does not converge, for about 3 of 100 matrices of low rank
    with rows of zeros, as from dead units, and for some of subnormal numbers, as from masks that close. Shifting the
    diagonal by a rounding error of the trace, and at least by the smallest normal number, prevents both without loss of
    accuracy, since eigenvalues are not known better than that.

    Args:
        matrix: Tensor of shape ``(..., n, n)``, finite; only the lower triangle is read.
        vectors: Whether to compute the eigenvectors.
        overwrite: Whether the matrix may be overwritten, which saves a copy.

    Returns:
        Eigenvalues ``(..., n)``, and eigenvectors ``(..., n, n)`` as columns or an empty tensor.
    """
    if _is_better_wide(matrix):
        wide, turned = decompose(matrix.double(), vectors=vectors, overwrite=True)
        return wide.to(matrix.dtype), turned.to(matrix.dtype)
    limits = torch.finfo(matrix.dtype)
    shift = (limits.eps * matrix.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)).clamp_min(limits.tiny)
    shifted = matrix if overwrite else matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(shift)
    if vectors:
        eigenvalues, eigenvectors = torch.linalg.eigh(shifted)
    else:
        eigenvalues, eigenvectors = torch.linalg.eigvalsh(shifted), matrix.new_empty(0)
    return eigenvalues - shift, eigenvectors


def _is_better_wide(matrix: Tensor) -> bool:
    """Tell whether float64 is faster: in float32, CUDA takes Jacobi's algorithm for these sizes, which is slower."""
    return matrix.is_cuda and matrix.dtype == torch.float32 and 32 < matrix.shape[-1] <= 512


def check_embeddings(embeddings: Tensor) -> None:
    """Raise an error unless it is a floating tensor ``(..., N, d)`` with rows and columns."""
    check_floating("embeddings", embeddings)
    shape = tuple(embeddings.shape)
    if len(shape) < 2:
        raise ValueError(
            f"`embeddings` must have shape (..., N, d), got {shape}; a single sample is `embeddings.unsqueeze(0)`"
        )
    if 0 in shape[-2:]:
        raise ValueError(f"`embeddings` must have shape (..., N, d) with at least one row and one column, got {shape}")


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert float16 and bfloat16 to float32; float32 and float64 are unchanged."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def widened(embeddings: Tensor) -> Tensor:
    """Rows in float32 at least; one whose largest entry is subnormal in float16 becomes a row of zeros.

    The gradient is divided by the row's length and would not be finite when cast back.

    Returns:
        The rows, of the same shape.
    """
    wide = at_least_float32(embeddings)
    return _without_subnormal_rows(wide, embeddings.dtype) if embeddings.dtype == torch.float16 else wide


def exact_rows(embeddings: Tensor) -> Tensor:
    """Rows in float64 if the device supports it; rows whose largest entry is subnormal in their dtype become zero."""
    wide = at_least_float32(embeddings)
    return exact(wide if wide.dtype == torch.float64 else _without_subnormal_rows(wide, embeddings.dtype))


def _without_subnormal_rows(wide: Tensor, dtype: torch.dtype) -> Tensor:
    small = wide.detach().abs().amax(-1, keepdim=True) < torch.finfo(dtype).tiny
    return wide.masked_fill(small, 0)


def widened_matrices(matrices: Tensor) -> Tensor:
    """Matrices in at least float32; those whose largest entry is subnormal in float16 become zero, as in `widened`."""
    wide = at_least_float32(matrices)
    if matrices.dtype != torch.float16:
        return wide
    small = wide.detach().abs().amax((-2, -1), keepdim=True) < torch.finfo(torch.float16).tiny
    return wide.masked_fill(small, 0)


def exact(tensor: Tensor) -> Tensor:
    """The tensor in float64 if the device supports it.

    A spectrum is computed from products of rows. If these are nearly parallel, as in a collapsed representation, one
    eigenvalue is near 1 and all others are below the rounding errors of float32.

    Returns:
        A float64 tensor of the same shape.
    """
    return at_least_float32(tensor) if tensor.device.type == "mps" else tensor.double()


def as_wide(result: Tensor, given: Tensor) -> Tensor:
    """A result in float32 for half-precision input, else in the input's dtype."""
    return result.to(torch.promote_types(given.dtype, torch.float32))


def full_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    """Disable autocast for the device of ``tensor``, if enabled."""
    device_type = tensor.device.type
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def keep_signature(forward: Forward) -> Forward:
    """Look up the signature of a ``Function.forward`` once; torch does so at every call, in 30 microseconds."""
    vars(forward)["__signature__"] = inspect.signature(forward)
    return forward


class _NormalizeRows(Function):
    """Rows and their lengths. The backward pass uses both, so it can be differentiated any number of times."""

    generate_vmap_rule = True

    @staticmethod
    @keep_signature
    def forward(embeddings: Tensor) -> tuple[Tensor, Tensor]:
        return rows_and_lengths(embeddings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_length: Tensor) -> Tensor:
        rows, length = ctx.saved_tensors
        grad: Tensor = (grad_rows - rows * (rows * grad_rows).sum(-1, keepdim=True)) / length + rows * grad_length
        return grad


class _SmallerGram(Function):
    """Autograd alone would compute the large product of the backward pass twice, once per factor."""

    generate_vmap_rule = True

    @staticmethod
    @keep_signature
    def forward(rows: Tensor) -> Tensor:
        return gram(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        n, d = rows.shape[-2:]
        with full_precision(rows):
            both = (grad + grad.mT) / n
            grad_rows: Tensor = both @ rows if n <= d else rows @ both
        return grad_rows
