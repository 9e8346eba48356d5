"""Eigenvectors of a matrix that changes little between calls, by products alone."""

import torch
from torch import Tensor

from lightning_plugins.functional.products import add_product

_LARGEST = 0.7  # bound on the norm of a rotation's generator, for which one Newton-Schulz step suffices


def follow_eigenvectors(matrix: Tensor, vectors: Tensor | None = None, *, passes: int = 1) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric matrices from approximate eigenvectors, such as those of a step before.

    No decomposition, and no host synchronisation: on an accelerator a decomposition waits for the host and takes
    milliseconds, these products microseconds. A pass rotates every pair of vectors by the angle of first-order
    perturbation theory, all pairs at once: the error is about squared. Pairs whose eigenvalues are closer than their
    coupling rotate less; leaving them unrotated changes no continuous function of the matrix by more than the coupling.
    Matrices that are far from diagonal in the given basis approach it over several passes.

    Args:
        matrix: Symmetric tensor of shape ``(..., n, n)``, float32 or float64, finite.
        vectors: Orthonormal columns of shape ``(..., n, n)``, close to eigenvectors; None if the matrix itself is
            nearly diagonal.
        passes: Number of passes, at least 1.

    Returns:
        Rayleigh quotients ``(..., n)`` in ascending order, which are exact to second order in the error of the vectors,
        and the vectors ``(..., n, n)`` as columns, orthonormal to about rounding errors. Without gradient.

    Raises:
        ValueError: If ``passes`` is less than 1.

    Example:
        >>> values, vectors = follow_eigenvectors(torch.tensor([[2.0, 0.01], [0.01, 1.0]]))
        >>> values
        tensor([0.9999, 2.0001])

    Source:
        Ours; close to Ogita and Aishima, "Iterative refinement for symmetric eigenvalue decomposition", 2018.
    """
    if passes < 1:
        raise ValueError(f"`passes` must be at least 1, got {passes}")
    with torch.no_grad():
        n = matrix.shape[-1]
        flat = matrix.reshape(-1, n, n)
        # By the largest entry: couplings and gaps are squared, and would underflow or overflow.
        scale = torch.linalg.vector_norm(flat, ord=torch.inf, dim=(-2, -1), keepdim=True)
        flat = flat / scale.clamp_min(torch.finfo(matrix.dtype).tiny)
        if vectors is None:
            found = _orthonormal(_rotation(flat))
        else:
            found = vectors.reshape(-1, n, n)
            passes += 1
        for _ in range(passes - 1):
            inside = _product(found.mT, _product(flat, found))
            found = _orthonormal(_product(found, _rotation(inside)))
        values, order = (_product(flat, found) * found).sum(-2).sort(-1)
        found = found.gather(-1, order[:, None, :].expand_as(found))
        return (values * scale[..., 0]).reshape(matrix.shape[:-1]), found.reshape(matrix.shape)


def _rotation(inside: Tensor) -> Tensor:
    """``I + E + E @ E / 2``, the exponential to second order of the rotations' skew-symmetric generator."""
    diagonal = inside.diagonal(dim1=-2, dim2=-1)
    gap = diagonal[:, None, :] - diagonal[:, :, None]
    # E_ij = c g / (g ** 2 + 4 c ** 2) for the coupling c = A_ij and the gap g: c / g where the gap is large.
    # Among equal eigenvalues both are rounding errors of the products, and no reason to rotate.
    noise = 16 * inside.shape[-1] ** 0.5 * torch.finfo(inside.dtype).eps * diagonal.abs().amax(-1)[:, None, None]
    divisor = gap.square().addcmul(inside, inside, value=4).add_(noise.square().clamp_min(torch.finfo(gap.dtype).tiny))
    turn = inside * gap / divisor
    turn = torch.sub(turn, turn.mT).mul_(0.5)  # products of three matrices are symmetric only up to rounding
    square = _product(turn, turn)
    # The norm of E is at most the fourth root of the sum of its singular values' fourth powers.
    norm = torch.linalg.matrix_norm(square, keepdim=True).sqrt()
    shrink = (_LARGEST / norm.clamp_min(_LARGEST)).clamp_max(1)
    result: Tensor = (turn * shrink).addcmul_(square, shrink.square(), value=0.5)
    result.diagonal(dim1=-2, dim2=-1).add_(1)
    return result


def _orthonormal(vectors: Tensor) -> Tensor:
    """A Newton-Schulz step towards orthonormal columns, which squares the deviation."""
    return add_product(vectors, vectors, _product(vectors.mT, vectors), beta=1.5, alpha=-0.5)


def _product(left: Tensor, right: Tensor) -> Tensor:
    return add_product(left, left, right, beta=0)
