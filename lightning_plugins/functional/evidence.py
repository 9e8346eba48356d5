"""Evidence of Bayesian linear regression from sums, the code length of the targets in nats."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_plugins._checks import check_positive_number
from lightning_plugins.functional.tensors import check_floating, check_real, check_shape

_POINTS = 161  # size of the search grid for the largest evidence, before refinement
_REFINEMENTS = 52  # bisections: in the end the interval is as small as rounding errors


class Evidence(NamedTuple):
    """The largest evidence over both precisions, per target.

    Attributes:
        log_evidence: In nats, total over all rows; shape ``(k,)``.
        ratio: Prior precision over noise precision, the ``lambda`` of the ridge with the same mean; shape ``(k,)``.
        noise_precision: Shape ``(k,)``.
    """

    log_evidence: Tensor
    ratio: Tensor
    noise_precision: Tensor


def log_evidence(eigenvalues: Tensor, projections: Tensor, target_squares: Tensor, count: int | Tensor) -> Evidence:
    """Maximise the evidence of Bayesian linear regression over prior and noise precision.

    For ``y ~ N(X w, I / b)`` and ``w ~ N(0, I / a)`` the density of the targets is that of
    ``N(0, (I + X X.T * b / a) / b)``. In the eigenbasis of ``X.T @ X`` the optimal ``b`` for a ratio ``a / b`` has a
    closed form, so only one parameter must be searched. Its negative is the length in nats of a Bayesian code of the
    targets.

    Args:
        eigenvalues: Of ``X.T @ X``, shape ``(d,)``.
        projections: Eigenvectors, transposed, times ``X.T @ Y``, shape ``(d, k)``.
        target_squares: Sums of the squared targets, shape ``(k,)``.
        count: Number of rows.

    Returns:
        The evidence and its maximiser. Divided by ``count`` it equals LogME.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a shape is wrong.

    Example:
        >>> x, y = torch.eye(2).double(), torch.tensor([[1.0], [1.0]]).double()
        >>> round(log_evidence(torch.ones(2).double(), x @ y, (y * y).sum(0), 2).log_evidence.item(), 3)
        -2.838

    Source:
        You et al. (LogME), ICML 2021, https://arxiv.org/abs/2102.11005. They iterate a fixed point in both precisions;
        the profile over their ratio has the same maximum and does not diverge where the features say nothing.
    """
    check_floating("eigenvalues", eigenvalues)
    check_floating("projections", projections)
    check_floating("target_squares", target_squares)
    if eigenvalues.ndim != 1 or not len(eigenvalues):
        raise ValueError(f"`eigenvalues` must have shape (d,) with d > 0, got {tuple(eigenvalues.shape)}")
    if projections.ndim != 2 or len(projections) != len(eigenvalues):
        raise ValueError(f"`projections` must have shape ({len(eigenvalues)}, k), got {tuple(projections.shape)}")
    check_shape("target_squares", target_squares, projections.shape[1:])
    for name, other in (("projections", projections), ("target_squares", target_squares)):
        if other.dtype != eigenvalues.dtype:
            raise TypeError(f"`{name}` must have the dtype of `eigenvalues`, {eigenvalues.dtype}, got {other.dtype}")
    if isinstance(count, Tensor):
        check_real("count", count)
        check_shape("count", count, ())
    else:
        check_positive_number("count", count)
    n = torch.as_tensor(count, dtype=eigenvalues.dtype, device=eigenvalues.device)
    largest = eigenvalues.amax().clamp_min(torch.finfo(eigenvalues.dtype).tiny)

    grid = torch.linspace(-25.0, 14.0, _POINTS, dtype=eigenvalues.dtype, device=eigenvalues.device) + largest.log()
    ratios = grid.exp()[:, None].expand(-1, projections.shape[1])
    best = evidence_at(eigenvalues, projections, target_squares, n, ratios).argmax(dim=0)
    low, high = grid[(best - 1).clamp_min(0)], grid[(best + 1).clamp_max(_POINTS - 1)]
    for _ in range(
        _REFINEMENTS
    ):  # bracket of the sign change of the slope, which is far more precise than the maximum of the value
        middle = (low + high) / 2
        rising = _slope(eigenvalues, projections, target_squares, n, middle.exp()) > 0
        low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
    ratio = ((low + high) / 2).exp()
    error = quadratic_form(eigenvalues, projections, target_squares, ratio[None])[0]
    return Evidence(evidence_at(eigenvalues, projections, target_squares, n, ratio[None])[0], ratio, n / error)


def evidence_at(
    eigenvalues: Tensor,
    projections: Tensor,
    target_squares: Tensor,
    count: Tensor,
    ratio: Tensor,
    noise_precision: Tensor | None = None,
) -> Tensor:
    """Evidence at ratios of the precisions, shape ``(L, k)``; at the best noise precision unless one is given."""
    error = quadratic_form(eigenvalues, projections, target_squares, ratio)
    precision = count / error if noise_precision is None else noise_precision
    volume = torch.log1p(eigenvalues[:, None] / ratio[:, None, :]).sum(dim=1)
    return 0.5 * (count * (precision / (2 * math.pi)).log() - precision * error - volume)


def _slope(eigenvalues: Tensor, projections: Tensor, target_squares: Tensor, count: Tensor, ratio: Tensor) -> Tensor:
    """Derivative of the evidence at the best noise precision with respect to the log ratio; shape ``(k,)``."""
    error = quadratic_form(eigenvalues, projections, target_squares, ratio[None])[0]
    denominator = eigenvalues[:, None] + ratio
    gain = ratio * (projections / denominator).square().sum(dim=0)
    return 0.5 * ((eigenvalues[:, None] / denominator).sum(dim=0) - count * gain / error)


def quadratic_form(eigenvalues: Tensor, projections: Tensor, target_squares: Tensor, ratio: Tensor) -> Tensor:
    """``y.T @ inverse(I + X X.T / ratio) @ y``, shape ``(L, k)``, clamped at a rounding error of ``y.T @ y``."""
    explained = (projections.square() / (eigenvalues[:, None] + ratio[:, None, :])).sum(dim=1)
    limits = torch.finfo(eigenvalues.dtype)
    floor = (target_squares * limits.eps).clamp_min(limits.tiny)
    return torch.maximum(target_squares - explained, floor)
