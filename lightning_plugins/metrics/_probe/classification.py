"""Linear classifiers from sums, and softmax regression on stored rows, evaluated on stored held-out rows."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_plugins.metrics._probe.cross_validation import CrossValidation, Training

_DECAYS = (1e-4, 1e-2, 1.0)  # of softmax regression
_STEPS = 100


class KeptRows(NamedTuple):
    """Rows on which classifiers are evaluated.

    Attributes:
        features: Shape ``(R, d)``, shifted as in the sums.
        classes: Integers of shape ``(R,)``.
        folds: Fold of each row, shape ``(R,)``.
    """

    features: Tensor
    classes: Tensor
    folds: Tensor


def correct_predictions(
    probe: CrossValidation, rows: KeptRows, columns: slice, shift: Tensor, *, classifier: str
) -> Tensor:
    """Return which stored rows are classified correctly by a classifier fitted without their fold.

    Args:
        probe: The sums of all rows, including the stored ones.
        rows: The stored rows, with the classes encoded in ``columns``.
        columns: The target columns with the indicators of these classes.
        shift: The shift subtracted from these indicators, shape ``(C,)``.
        classifier: ``"ridge"``, ``"lda"`` or ``"softmax"``.

    Returns:
        Boolean tensor of shape ``(R,)``.
    """
    correct = torch.zeros(len(rows.classes), dtype=torch.bool, device=rows.classes.device)
    for fold, training in enumerate(probe.outer):
        held_out = rows.folds == fold
        if not bool(held_out.any()):
            continue
        features = rows.features[held_out]
        if classifier == "softmax":
            scores = _softmax_scores(rows, fold, training, features)
        else:
            fit: Callable[..., tuple[Tensor, Tensor]] = _ridge if classifier == "ridge" else _lda
            weights, intercept = fit(probe, training, fold, columns, shift)
            scores = features @ weights + intercept
        correct[held_out] = scores.argmax(dim=1) == rows.classes[held_out]
    return correct


def _ridge(
    probe: CrossValidation, training: Training, fold: int, columns: slice, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """One penalty for all classes, with the smallest total error, so that scores are comparable."""
    choice = probe.inner_errors[fold][:, :, columns].sum(dim=(0, 2)).argmin()
    weights, intercept = probe.weights(training, choice.expand(training.system.projections.shape[1]))
    return weights[:, columns], intercept[columns] + shift


def _lda(probe: CrossValidation, training: Training, fold: int, columns: slice, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Class means and pooled covariance from the sums; the ridge penalty per row is added to the covariance."""
    d, n = probe.num_features, training.sums[0, 0]
    share = training.mean[d:][columns] + shift  # of the rows, by class
    cross = training.sums[1 : 1 + d, 1 + d :][:, columns] / n  # centred features with centred indicators
    present = share > 0.5 / n
    means = torch.where(present, cross / share.clamp_min(0.5 / n), 0.0)  # of centred features: E[x 1_c] / P(c)
    within = training.sums[1 : 1 + d, 1 : 1 + d] / n - (means * share) @ means.T
    choice = probe.inner_errors[fold][:, :, columns].sum(dim=(0, 2)).argmin()
    ridge = probe.lambdas[choice] / n + 1e-9
    solved = torch.linalg.solve(within + ridge * torch.eye(d, dtype=within.dtype, device=within.device), means)
    constant = torch.where(present, share.clamp_min(0.5 / n).log(), -torch.inf) - 0.5 * (means * solved).sum(dim=0)
    weights = solved / training.scale[:d, None]
    return weights, constant - training.mean[:d] @ weights


def _softmax_scores(rows: KeptRows, fold: int, training: Training, features: Tensor) -> Tensor:
    """Softmax regression on the stored rows of other folds, with the weight decay chosen on one of them."""
    d = features.shape[1]
    mean, scale = training.mean[:d], training.scale[:d]
    kept = rows.folds != fold
    x, y, inner = (rows.features[kept] - mean) / scale, rows.classes[kept], rows.folds[kept]
    classes = int(rows.classes.max()) + 1
    judge = inner == inner[0]
    losses = []
    for decay in _DECAYS:
        weight, bias = _fit_softmax(x[~judge], y[~judge], classes, decay)
        losses.append(cross_entropy(x[judge] @ weight + bias, y[judge]))
    weight, bias = _fit_softmax(x, y, classes, _DECAYS[int(torch.stack(losses).argmin())])
    return (features - mean) / scale @ weight + bias


def _fit_softmax(x: Tensor, y: Tensor, classes: int, decay: float) -> tuple[Tensor, Tensor]:
    with torch.enable_grad(), torch.inference_mode(False):
        x, y = x.clone(), y.clone()
        weight = torch.zeros(x.shape[1], classes, dtype=x.dtype, device=x.device, requires_grad=True)
        bias = torch.zeros(classes, dtype=x.dtype, device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=_STEPS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(x @ weight + bias, y) + 0.5 * decay * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    return weight.detach(), bias.detach()
