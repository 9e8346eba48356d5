"""Ridge regression from sums of products, for all penalties from one eigendecomposition."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_plugins._checks import check_instance
from lightning_plugins.functional.spectrum import decompose
from lightning_plugins.functional.tensors import check_floating


class RidgeSystem(NamedTuple):
    """The normal equations of a least-squares problem in the eigenbasis of its Gram matrix.

    Attributes:
        eigenvalues: Of the Gram matrix, shape ``(d,)``, smallest first, rounding errors below zero set to zero.
        eigenvectors: As columns, shape ``(d, d)``.
        projections: ``eigenvectors.T @ cross``, shape ``(d, k)``.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    projections: Tensor

    def coefficients(self, lambdas: Tensor) -> Tensor:
        """Solutions in the eigenbasis.

        Args:
            lambdas: Strengths of the penalty, of shape ``(L,)``, or ``(L, k)`` for one per target.

        Returns:
            Tensor of shape ``(L, d, k)``; 0 along directions without variance, even for a penalty of zero.
        """
        strength = lambdas[:, None, None] if lambdas.ndim == 1 else lambdas[:, None, :]
        denominator = self.eigenvalues[:, None] + strength
        tiny = torch.finfo(denominator.dtype).eps * self.eigenvalues[-1:].clamp_min(torch.finfo(denominator.dtype).tiny)
        return torch.where(denominator > tiny * len(self.eigenvalues), self.projections / denominator, 0.0)


class HeldOutSums(NamedTuple):
    """Sums of targets and predictions over held-out rows, each of shape ``(L, k)`` or broadcastable to it.

    Attributes:
        rows: Number of rows.
        target: Sum of the targets.
        target_squares: Sum of their squares.
        prediction: Sum of the predictions.
        prediction_squares: Sum of their squares.
        products: Sum of target times prediction.
    """

    rows: Tensor
    target: Tensor
    target_squares: Tensor
    prediction: Tensor
    prediction_squares: Tensor
    products: Tensor

    def moved(self, offset: Tensor) -> "HeldOutSums":
        """The sums after adding ``offset``, of shape ``(k,)``, to targets and predictions."""
        n = self.rows

        def squares(a: Tensor, b: Tensor, product: Tensor) -> Tensor:
            return product + offset * (a + b) + n * offset.square()

        return HeldOutSums(
            rows=n,
            target=self.target + n * offset,
            target_squares=squares(self.target, self.target, self.target_squares),
            prediction=self.prediction + n * offset,
            prediction_squares=squares(self.prediction, self.prediction, self.prediction_squares),
            products=squares(self.target, self.prediction, self.products),
        )

    @property
    def squared_error(self) -> Tensor:
        """Sum of the squared differences."""
        return (self.target_squares - 2 * self.products + self.prediction_squares).clamp_min(0.0)


class ProbeScores(NamedTuple):
    """Scores of predictions on held-out rows, each of shape ``(L, k)``.

    Attributes:
        r2: Coefficient of determination against the mean of the held-out targets: at most 1, below 0 if the mean
            predicts better; NaN for a constant target.
        pearson: Correlation of prediction and target, in ``[-1, 1]``; NaN if either is constant.
        rmse: Root mean squared error, in the target's unit.
        v_information: Gaussian V-information in nats, ``0.5 * log(variance / mean squared error)``.
    """

    r2: Tensor
    pearson: Tensor
    rmse: Tensor
    v_information: Tensor


def ridge_system(gram: Tensor, cross: Tensor) -> RidgeSystem:
    """Decompose normal equations once, for solutions under any penalty.

    Args:
        gram: ``X.T @ X``, shape ``(d, d)``, float32 or float64, usually of centred columns.
        cross: ``X.T @ Y``, shape ``(d, k)``.

    Returns:
        The system in its eigenbasis.

    Raises:
        TypeError: If an argument is not a floating tensor.
        ValueError: If the shapes do not fit.

    Example:
        >>> ridge_system(2 * torch.eye(2), torch.ones(2, 1)).eigenvalues
        tensor([2., 2.])
    """
    check_floating("gram", gram)
    check_floating("cross", cross)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not len(gram):
        raise ValueError(f"`gram` must have shape (d, d) with d > 0, got {tuple(gram.shape)}")
    if gram.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"`gram` must be of dtype float32 or float64, got {gram.dtype}")
    if cross.dtype != gram.dtype:
        raise TypeError(f"`cross` must have the dtype of `gram`, {gram.dtype}, got {cross.dtype}")
    if cross.ndim != 2 or len(cross) != len(gram):
        raise ValueError(f"`cross` must have shape ({len(gram)}, k), as `gram` has, got {tuple(cross.shape)}")
    eigenvalues, eigenvectors = decompose(gram, vectors=True)
    return RidgeSystem(eigenvalues.clamp_min(0.0), eigenvectors, eigenvectors.mT @ cross)


def ridge_path(gram: Tensor, cross: Tensor, lambdas: Tensor) -> Tensor:
    """Ridge solutions for many penalties from one eigendecomposition.

    For every ``lambda`` the minimiser of ``|Y - X @ w|**2 + lambda * |w|**2``, the convention of scikit-learn's
    ``Ridge(alpha=lambda)``: ``lambda`` grows with the number of rows.

    Args:
        gram: ``X.T @ X``, shape ``(d, d)``, float32 or float64. Centre the columns for a fit with an intercept.
        cross: ``X.T @ Y``, shape ``(d, k)``.
        lambdas: Shape ``(L,)``, non-negative. At 0 the minimum-norm solution.

    Returns:
        Weights of shape ``(L, d, k)``.

    Raises:
        TypeError: If an argument is not a floating tensor.
        ValueError: If the shapes do not fit, or ``lambdas`` are none, negative or not finite.

    Example:
        >>> ridge_path(torch.eye(2), torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 1.0])).squeeze()
        tensor([[1.0000, 3.0000],
                [0.5000, 1.5000]])

    Source:
        Hoerl and Kennard, Technometrics, 1970; the eigenbasis form is textbook.
    """
    system = ridge_system(gram, cross)
    coefficients = system.coefficients(check_lambdas(lambdas).to(gram))
    return system.eigenvectors @ coefficients


def check_lambdas(lambdas: Tensor) -> Tensor:
    """Return penalties of shape ``(L,)``, non-negative and finite.

    Raises:
        TypeError: If they are not a floating tensor.
        ValueError: If they are of another shape or out of range.
    """
    check_floating("lambdas", lambdas)
    if lambdas.ndim != 1 or not len(lambdas):
        raise ValueError(f"`lambdas` must have shape (L,) with L > 0, got {tuple(lambdas.shape)}")
    if not bool((torch.isfinite(lambdas) & (lambdas >= 0)).all()):
        raise ValueError(f"`lambdas` must be finite and at least 0, got {lambdas.tolist()}")
    return lambdas


def held_out_sums(weights: Tensor, moments: Tensor) -> HeldOutSums:
    """Sums of the predictions on held-out rows, from the rows' moments alone.

    Args:
        weights: Shape ``(L, d, k)``.
        moments: ``Z.T @ Z`` of the held-out rows ``Z = [1, x, y]``, centred and scaled as the training rows were, shape
            ``(1 + d + k, 1 + d + k)``.

    Returns:
        The sums, each of shape ``(L, k)`` (count scalar, targets ``(k,)``).
    """
    d = weights.shape[1]
    x, y = slice(1, 1 + d), slice(1 + d, None)
    return HeldOutSums(
        rows=moments[0, 0],
        target=moments[0, y],
        target_squares=moments[y, y].diagonal(),
        prediction=moments[0, x] @ weights,
        prediction_squares=(weights * (moments[x, x] @ weights)).sum(dim=1),
        products=(weights * moments[x, y]).sum(dim=1),
    )


def probe_scores(sums: HeldOutSums) -> ProbeScores:
    """Scores of predictions from sums over held-out rows.

    Args:
        sums: Sums of targets, predictions, their squares and products; adding the same constant to targets and
            predictions does not change the scores.

    Returns:
        The scores.

    Example:
        >>> y, p = torch.tensor([[1.0], [2.0], [3.0]]).double(), torch.tensor([[1.0], [2.0], [2.0]]).double()
        >>> sums = HeldOutSums(torch.tensor(3), y.sum(0), (y * y).sum(0), p.sum(0), (p * p).sum(0), (y * p).sum(0))
        >>> round(probe_scores(sums).r2.item(), 4)  # 1 - 1 / 2
        0.5

    Source:
        V-information: Xu et al., ICLR 2020, https://arxiv.org/abs/2002.10689, for Gaussian predictions of constant
        variance; the variance without features is that of the held-out targets.
    """
    check_instance("sums", sums, HeldOutSums, "a HeldOutSums")
    n, error = sums.rows, sums.squared_error
    target = (sums.target_squares - sums.target.square() / n).clamp_min(0.0)
    prediction = (sums.prediction_squares - sums.prediction.square() / n).clamp_min(0.0)
    covariance = sums.products - sums.target * sums.prediction / n
    eps = torch.finfo(error.dtype).eps
    varies = target > 64 * eps * sums.target_squares
    ratio = torch.where(varies, error / target, torch.nan)
    both = varies & (prediction > 64 * eps * sums.prediction_squares)
    pearson = torch.where(both, covariance / (target * prediction).sqrt(), torch.nan)
    return ProbeScores(1 - ratio, pearson.clamp(-1.0, 1.0), (error / n).sqrt(), -0.5 * ratio.log())
