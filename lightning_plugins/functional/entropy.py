"""Entropies and effective ranks of an embedding matrix."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_plugins._checks import check_choice, is_number, shown
from lightning_plugins.functional.embedding_entropy import embedding_entropy
from lightning_plugins.functional.matrix_log import product_entropy
from lightning_plugins.functional.spectral_sum import spectral_sum
from lightning_plugins.functional.spectrum import (
    as_wide,
    at_least_float32,
    check_embeddings,
    exact_rows,
    full_precision,
    normalize_rows,
    smaller_gram,
    widened,
)
from lightning_plugins.functional.tensors import check_floating

Method = Literal["auto", "eigh", "products"]
Spectrum = Literal["eigenvalues", "singular_values"]

# On a GPU even a decomposition of this size takes longer than 25 products, and synchronises with the host. On the CPU a
# decomposition takes as long as four to nine products, at every size.
_FEWEST_COLUMNS_FOR_PRODUCTS = 32


def von_neumann_entropy(embeddings: Tensor, *, method: Method = "auto") -> Tensor:
    """Von Neumann entropy, in nats, of the autocorrelation matrix of the embeddings.

    With ``Z`` the rows scaled to unit length and ``p`` the eigenvalues of ``C = Z.T @ Z / N``, which add up to 1, the
    value is ``-sum(p * log(p))`` with ``0 * log(0) = 0``. No mean is subtracted. All-zero rows stay zero: they lower
    the trace of ``C``. Value, gradient and second derivative are finite for every finite input.

    Args:
        embeddings: Floating tensor of shape ``(..., N, d)``: ``N >= 1`` samples of dimension ``d >= 1``.
        method: See ``matrix_entropy``.

    Returns:
        Tensor of shape ``(...)`` in ``[0, log(min(N, d))]``: float32 for float16 and bfloat16 input, else the input's
        dtype. NaN for a matrix with a non-finite value. Autocast is disabled.

    Raises:
        TypeError: If ``embeddings`` is not a real floating tensor, or ``method`` not a string.
        ValueError: If ``embeddings`` has fewer than two dimensions, no rows or no columns; if ``method`` is unknown.

    Example:
        >>> von_neumann_entropy(torch.eye(4))  # four equal eigenvalues: log(4)
        tensor(1.3863)

    Source:
        Kim et al., CVPR 2023, https://arxiv.org/abs/2304.01434. Unlike the published code, the gradient is finite
        where an eigenvalue is zero: duplicated rows, dead features, a single row.
    """
    check_embeddings(embeddings)
    check_choice("method", method, get_args(Method))
    with full_precision(embeddings):
        wide = widened(embeddings)
        if uses_products(wide, min(wide.shape[-2:]), method):
            return embedding_entropy(wide, products=True)
        return as_wide(embedding_entropy(exact_rows(embeddings), products=False), embeddings)


def matrix_entropy(matrix: Tensor, *, method: Method = "auto") -> Tensor:
    """Von Neumann entropy, in nats, of symmetric positive semidefinite matrices: ``-trace(C @ log(C))``.

    The gradient is ``-(log(C) + I)`` in closed form, with the logarithm of a vanishing eigenvalue clamped.

    Args:
        matrix: Floating tensor of shape ``(..., n, n)``, symmetric, positive semidefinite, of trace at most 1. Only the
            lower triangle is read; the gradient is symmetric.
        method: ``"eigh"`` decomposes the matrix. ``"products"`` uses 25 matrix products instead, needs no host
            synchronisation and works under CUDA graphs; on matrices of trace 1 it is within ``4e-4 * sqrt(n * c)``
            nats, and its gradient with respect to ``Z`` within the same number times ``2 / sqrt(N)`` in the Frobenius
            norm, for ``c`` between the largest eigenvalue and ``n ** 0.25`` times that. (In practice: value within 1e-4
            nats, gradient within 1e-4 to 4e-3 of its norm, in float64 too.) Its second derivative is that of the
            approximation. ``"auto"`` uses products for float32 on a GPU from ``n = 32`` on, else ``"eigh"``.

    Returns:
        Tensor of shape ``(...)`` in ``[0, log(n)]`` for matrices of trace 1: float32 for float16 and bfloat16 input,
        else the input's dtype. NaN for a matrix with a non-finite value.

    Raises:
        TypeError: If ``matrix`` is not a real floating tensor, or ``method`` not a string.
        ValueError: If ``matrix`` does not have shape ``(..., n, n)`` with ``n >= 1``; if ``method`` is unknown.

    Example:
        >>> matrix_entropy(torch.eye(2) / 2)
        tensor(0.6931)

    Source:
        Kim et al., CVPR 2023, https://arxiv.org/abs/2304.01434, for the value.
    """
    check_floating("matrix", matrix)
    check_choice("method", method, get_args(Method))
    shape = tuple(matrix.shape)
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] == 0:
        raise ValueError(f"`matrix` must have shape (..., n, n) with n of at least 1, got {shape}")
    wide = at_least_float32(matrix)
    return product_entropy(wide) if uses_products(wide, shape[-1], method) else -spectral_sum(wide, logarithm=True)


def renyi_entropy(embeddings: Tensor, order: float = 2.0) -> Tensor:
    """Rényi entropy, in nats, of the eigenvalues of the autocorrelation matrix of the embeddings.

    ``log(sum(p ** order)) / (1 - order)`` with ``p`` as in ``von_neumann_entropy``. Order 2 is ``-log(trace(C @ C))``
    and needs no eigenvalues; order 1 is the von Neumann entropy. It is non-increasing in the order.

    Args:
        embeddings: Floating tensor of shape ``(..., N, d)``: ``N >= 1`` samples of dimension ``d >= 1``.
        order: Above 0 and finite. Below 1, eigenvalues under ``8 * eps`` times the largest are treated as rounding
            errors and dropped.

    Returns:
        Tensor of shape ``(...)`` in ``[0, log(min(N, d))]`` if no row is all-zero; 0 if all are. Float32 for float16
        and bfloat16 input, else the input's dtype. NaN for a matrix with a non-finite value.

    Raises:
        TypeError: If ``embeddings`` is not a real floating tensor, or ``order`` not a number.
        ValueError: If ``embeddings`` has fewer than two dimensions, no rows or no columns; if ``order`` is not above 0
            and finite.

    Example:
        >>> renyi_entropy(torch.eye(4))
        tensor(1.3863)

    Source:
        Rényi, "On measures of entropy and information", 1961.
    """
    check_embeddings(embeddings)
    if not is_number(order):
        raise TypeError(f"`order` must be a number above 0, got {shown(order)}")
    order = float(order)
    if not 0 < order < math.inf:
        raise ValueError(f"`order` must be above 0 and finite, got {order!r}; 1 is the von Neumann entropy")
    if order == 1:
        return von_neumann_entropy(embeddings)
    with full_precision(embeddings):
        gram = smaller_gram(normalize_rows(exact_rows(embeddings)))
        moment = gram.square().sum((-2, -1)) if order == 2 else spectral_sum(gram, power=order)
        # All-zero embeddings: the logarithm of 1 gives the value 0, and the mask a gradient of 0.
        entropy: Tensor = moment.masked_fill(moment == 0, 1).log() / (1 - order)
        return as_wide(entropy, embeddings)


def effective_rank(embeddings: Tensor, of: Spectrum = "eigenvalues") -> Tensor:
    """Effective rank: the number of equal values with the same entropy as the spectrum.

    Two quantities have this name; ``of`` selects one:

    * ``"eigenvalues"``: ``exp(von_neumann_entropy(embeddings))``, of the eigenvalues of the autocorrelation matrix of
      the rows scaled to unit length;
    * ``"singular_values"``: ``exp(-sum(q * log(q)))`` with ``q`` the singular values of the *raw* embeddings (neither
      scaled nor centred) divided by their sum; Roy and Vetterli's effective rank, known as RankMe. For rows of unit
      length it is the larger of the two. Singular values below ``sqrt(8 * eps)`` of float64, 4e-8, times the largest
      count as zero.

    Args:
        embeddings: Floating tensor of shape ``(..., N, d)``: ``N >= 1`` samples of dimension ``d >= 1``.
        of: ``"eigenvalues"`` or ``"singular_values"``.

    Returns:
        Tensor of shape ``(...)`` in ``[1, min(N, d)]``; 1 for all-zero embeddings. Float32 for float16 and bfloat16
        input, else the input's dtype. NaN for a matrix with a non-finite value.

    Raises:
        TypeError: If ``embeddings`` is not a real floating tensor, or ``of`` not a string.
        ValueError: If ``embeddings`` has fewer than two dimensions, no rows or no columns; if ``of`` is unknown.

    Example:
        >>> effective_rank(torch.diag(torch.tensor([1.0, 1.0, 5.0])))  # the rows' lengths do not count
        tensor(3.)
        >>> effective_rank(torch.diag(torch.tensor([1.0, 1.0, 5.0])), of="singular_values")
        tensor(2.2173)

    Source:
        Roy and Vetterli, EUSIPCO 2007; Garrido et al., ICML 2023 (RankMe), https://arxiv.org/abs/2210.02885, without
        its added 1e-7; Kim et al., CVPR 2023, for the eigenvalues.
    """
    check_embeddings(embeddings)
    check_choice("of", of, get_args(Spectrum))
    if of == "eigenvalues":
        return von_neumann_entropy(embeddings).exp()
    with full_precision(embeddings):
        wide = at_least_float32(embeddings)
        # Float64: a singular value is the square root of an eigenvalue, which magnifies rounding errors.
        precise = wide.double()
        largest = torch.linalg.vector_norm(precise.detach(), ord=torch.inf, dim=(-2, -1), keepdim=True)
        gram = smaller_gram(precise / largest.masked_fill(largest < torch.finfo(embeddings.dtype).tiny, torch.inf))
        total = spectral_sum(gram, power=0.5)
        total = total.masked_fill(total == 0, 1)
        # With s the singular values: entropy = log(sum(s)) - sum(s * log(s)) / sum(s), and log(s) = log(s ** 2) / 2.
        entropy = total.log() - spectral_sum(gram, power=0.5, logarithm=True) / (2 * total)
        return entropy.exp().to(wide.dtype)


def diagonal_entropy(embeddings: Tensor) -> Tensor:
    """Shannon entropy, in nats, of the diagonal of the autocorrelation matrix of the embeddings.

    The diagonal holds the share of each feature in the squared length of the rows. The value is at least
    ``von_neumann_entropy``, with equality only for uncorrelated features: the gap measures correlation.

    Args:
        embeddings: Floating tensor of shape ``(..., N, d)``: ``N >= 1`` samples of dimension ``d >= 1``.

    Returns:
        Tensor of shape ``(...)`` in ``[0, log(d)]``: float32 for float16 and bfloat16 input, else the input's dtype.
        NaN for a matrix with a non-finite value.

    Raises:
        TypeError: If ``embeddings`` is not a real floating tensor.
        ValueError: If ``embeddings`` has fewer than two dimensions, no rows or no columns.

    Example:
        >>> diagonal_entropy(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))  # two features, wholly correlated
        tensor(0.6931)

    Source:
        Kim et al., CVPR 2023, https://arxiv.org/abs/2304.01434.
    """
    check_embeddings(embeddings)
    with full_precision(embeddings):
        shares = normalize_rows(exact_rows(embeddings)).square().mean(-2)
        entropy: Tensor = -(shares * shares.clamp_min(torch.finfo(shares.dtype).tiny).log()).sum(-1)
        return as_wide(entropy, embeddings)


def uses_products(tensor: Tensor, n: int, method: Method) -> bool:
    """Return whether to use matrix products for matrices with ``n`` columns."""
    if method == "auto":
        return tensor.is_cuda and tensor.dtype == torch.float32 and n >= _FEWEST_COLUMNS_FOR_PRODUCTS
    return method == "products"
