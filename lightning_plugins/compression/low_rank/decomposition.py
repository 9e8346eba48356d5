"""A weight matrix as a product of two, optimal for every rank: in its entries, or in the layer's outputs."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_plugins.weights import Scheme, weight_to_matrix


class InputMoment(NamedTuple):
    """The second moment of a layer's inputs.

    Attributes:
        total: Sum of ``x xᵀ`` over the rows ``x``, shape ``(d, d)``: inputs of a linear layer; patches of a
            convolution, ``in * k * k`` in the order of its kernel.
        rows: The number of rows.
        damping: What is added to the diagonal, as a fraction of the diagonal's mean.
    """

    total: Tensor
    rows: float
    damping: float


class InputMoments(Protocol):
    """Second moments by layer name, such as `lightning_plugins.compression.Calibration`."""

    def moment(self, name: str) -> InputMoment:
        """The moment of a layer's inputs."""


class Decomposition:
    """The factors of a kernel's matrix ``W`` at every rank.

    Without a moment they are those of the truncated singular value decomposition. With one, ``W L`` is truncated, where
    ``L Lᵀ`` is the damped second moment ``M`` of the inputs: no other weight of this rank has a smaller error
    ``tr((W - Ŵ) M (W - Ŵ)ᵀ)`` of the outputs. With ``U`` the leading eigenvectors of ``W M Wᵀ`` that is
    ``Ŵ = U Uᵀ W``, for which ``L`` need be neither known nor inverted, so a moment may have any rank.

    Under scheme 2 an output sums what several rows of an image give, and no closed form minimises its error. The first
    kernel then comes from the moment of the ``1 x k`` strips that it sees, the second is the least-squares solution
    given the first, and where plain truncation with such a second kernel has the smaller error it is taken.

    Attributes:
        values: The singular values of ``W`` or ``W L``, descending, shape ``(min(m, n),)``: the sum of the squares from
            rank ``r`` on is the error at that rank (under scheme 2 with a moment a share of it that ranks alike).

    Args:
        weight: Finite tensor of shape ``(O, I, *k)``.
        moment: The second moment of the inputs, or None.
        scheme: How the kernel becomes a matrix.

    Raises:
        ValueError: If the moment is of another size.

    Example:
        >>> weight = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> moment = InputMoment(torch.diag(torch.tensor([1.0, 100.0])), rows=1, damping=1e-9)
        >>> left, right = Decomposition(weight, moment).factors(1)
        >>> (left @ right).round(decimals=3)  # the second input is ten times as large, so its weight stays
        tensor([[0., 0.],
                [0., 1.]])

    Source:
        Truncation in the metric of the inputs: Chen et al., DRONE, NeurIPS 2021; Wang et al., SVD-LLM, ICLR 2025,
        https://arxiv.org/abs/2403.07378. Our reading: damping and scheme 2.
    """

    def __init__(self, weight: Tensor, moment: InputMoment | None = None, *, scheme: Scheme = 1) -> None:
        self._shape = weight.shape
        with torch.autocast(weight.device.type, enabled=False):
            self._matrix = _matrix_of(weight, scheme)
            metric = None if moment is None else _metric_of(weight, moment)
            # Of a kernel with one row both schemes are the same, and both are in closed form.
            strips = scheme == 2 and weight.ndim == 4 and weight.shape[2] > 1
            self._outputs = metric if strips else None  # the metric of whole patches, where it is another one
            self.values: Tensor
            if metric is None:
                self._candidates = [_svd(self._matrix)]
                self.values = self._candidates[0][1]
            else:
                first = _of_strips(metric, self._shape) if strips else metric
                self.values, *candidate = _in_metric(self._matrix, first)
                self._candidates = [(candidate[0], candidate[1], candidate[2])]
                self._candidates += [_svd(self._matrix)] if strips else []

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """The two factors of a rank.

        Args:
            rank: From 1 to the number of `values`.

        Returns:
            Matrices of shapes ``(m, rank)`` and ``(rank, n)``, in float32, or float64 for a weight in float64.
        """
        with torch.autocast(self._matrix.device.type, enabled=False):
            pairs = [_split(one, rank) for one in self._candidates]
            if self._outputs is not None:
                refitted = [self._refit(right, self._outputs) for _, right in pairs]
                errors = torch.stack([error for _, _, error in refitted])
                pairs = [refitted[int(errors.argmin())][:2]]
            left, right = pairs[0]
            return left.to(self._matrix.dtype), right.to(self._matrix.dtype)

    def product(self, rank: int) -> Tensor:
        """The product of the factors of a rank.

        Args:
            rank: As for `factors`.

        Returns:
            Matrix of shape ``(m, n)``, in the dtype of the factors.
        """
        if self._outputs is not None:
            left, right = self.factors(rank)
            return left @ right
        with torch.autocast(self._matrix.device.type, enabled=False):
            left, lengths, right = self._candidates[0]  # without the roots, which would cost a digit
            return ((left[:, :rank] * lengths[:rank]) @ right[:rank]).to(self._matrix.dtype)

    def _refit(self, right: Tensor, metric: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The optimal second kernel for a given first one, by least squares on the outputs, and the remaining error."""
        kernel, first = self._kernels(right)
        products = first @ metric
        second = kernel @ products.T @ torch.linalg.pinv(products @ first.T, hermitian=True)
        rest = kernel - second @ first
        outputs, high, rank = self._shape[0], self._shape[2], len(right)
        left = second.reshape(outputs, rank, high).transpose(1, 2).reshape(outputs * high, rank)
        return left, right.double(), ((rest @ metric) * rest).sum()

    def _kernels(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """The kernel as ``O x (I k k)``, and the first kernel as a map from a patch to ``rank x high`` numbers."""
        outputs, inputs, high, wide = self._shape
        kernel = self._matrix.double().reshape(outputs, high, inputs, wide).transpose(1, 2).reshape(outputs, -1)
        rows = torch.eye(high, dtype=torch.float64, device=right.device)
        strips = right.double().reshape(-1, inputs, wide)
        return kernel, torch.einsum("rix,yz->ryizx", strips, rows).reshape(len(strips) * high, -1)


def _metric_of(weight: Tensor, moment: InputMoment) -> Tensor:
    """The damped moment in float64; the identity where every input was zero."""
    size = weight[0].numel()
    if moment.total.shape != (size, size):
        raise ValueError(
            f"`calibration` must have a moment of shape {(size, size)} for a weight of shape {tuple(weight.shape)}, "
            f"got {tuple(moment.total.shape)}"
        )
    metric = moment.total.to(weight.device).double()
    metric = (metric + metric.T) / 2
    mean = metric.diagonal().mean()
    identity = torch.eye(size, dtype=metric.dtype, device=metric.device)
    # Where every input was zero any weight is right; the plain truncation then, at an error of next to nothing.
    return identity * 1e-30 if mean <= 0 else metric + moment.damping * mean * identity


def _of_strips(metric: Tensor, shape: torch.Size) -> Tensor:
    """The moment of the ``1 x k`` strips, from that of whole patches."""
    inputs, high, wide = shape[1:]
    blocks = metric.reshape(inputs, high, wide, inputs, high, wide)
    return torch.einsum("ayxbyz->axbz", blocks).reshape(inputs * wide, inputs * wide)


def _in_metric(matrix: Tensor, metric: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The singular values of ``W L``, its left vectors, and ``W`` in their coordinates as lengths and unit rows."""
    matrix = matrix.double()
    tall = matrix.shape[0] > matrix.shape[1]
    basis, matrix = torch.linalg.qr(matrix) if tall else (None, matrix)
    energies, vectors = torch.linalg.eigh(matrix @ metric @ matrix.T)
    energies, vectors = energies.flip(0).clamp_min(0), vectors.flip(1)
    rows = vectors.T @ matrix
    lengths = torch.linalg.vector_norm(rows, dim=1)
    rows = rows / torch.where(lengths > 0, lengths, 1)[:, None]
    return energies.sqrt(), vectors if basis is None else basis @ vectors, lengths, rows


def _split(decomposed: tuple[Tensor, Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    left, lengths, right = decomposed
    root = lengths[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def decompose(weight: Tensor, *, scheme: Scheme = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The thin singular value decomposition of a kernel's matrix.

    Args:
        weight: Finite tensor of shape ``(O, I, *k)``.
        scheme: As for `low_rank_layer`.

    Returns:
        ``U`` of shape ``(m, r)``, the singular values ``(r,)``, largest first, and ``V^T`` of shape ``(r, n)``, with
        ``r = min(m, n)``; float32, or float64 for a weight in float64; no gradient flows.

    Example:
        >>> decompose(torch.diag(torch.tensor([1.0, 3.0])))[1]
        tensor([3., 1.])
    """
    with torch.autocast(weight.device.type, enabled=False):
        return _svd(_matrix_of(weight, scheme))


def _matrix_of(weight: Tensor, scheme: Scheme) -> Tensor:
    matrix = weight_to_matrix(weight.detach(), scheme=scheme)
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The decomposition of the matrix itself: its Gram matrix would lose half of the digits that factors keep."""
    try:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined] # documented, but not in its `__all__`
        # It did not converge, which is not known to happen in float64.
        U, S, Vh = (part.to(matrix.dtype) for part in torch.linalg.svd(matrix.double(), full_matrices=False))
    return U, S, Vh
