"""Fit a probe to its sums, with errors that explain why a fit is impossible."""

import torch
from torch import Tensor

from lightning_plugins.metrics._probe.classification import KeptRows, correct_predictions
from lightning_plugins.metrics._probe.code_length import description_length, evidence_per_row
from lightning_plugins.metrics._probe.cross_validation import CrossValidation
from lightning_plugins.metrics._probe.result import ProbeResult
from lightning_plugins.metrics._probe.settings import MIN_FOLDS, ProbeSettings


def fit_probe(moments: Tensor, sample: Tensor, settings: ProbeSettings) -> ProbeResult:
    """Fit and evaluate a probe.

    Args:
        moments: Moments of all rows by fold, with their shift.
        sample: Rows ``[fold, features, targets]`` for evaluating a classification.
        settings: The settings.

    Returns:
        The results.

    Raises:
        ValueError: If the rows allow no fit.
    """
    sums, shift = moments[:-1], moments[-1, 0, 1:]
    check_sums(sums, shift, settings)
    has_rows = sums[:, 0, 0] > 0
    probe = CrossValidation(sums[has_rows], settings.num_features, settings.strengths.to(sums.device))
    d, k = settings.num_features, settings.num_targets
    scores, total = probe.scores, probe.total
    r2 = scores.r2
    control = r2[k:].mean() if settings.controls else r2.new_tensor(torch.nan)
    weights, intercept = probe.weights(total, probe.final_choice)
    offset = shift[d:] - shift[:d] @ weights  # features and targets include their means
    correct, control_correct = _judge(probe, sample, settings, has_rows, shift)
    accuracy, control_accuracy = correct.double().mean(), control_correct.double().mean()
    gained = (r2[:k], control) if settings.task == "regression" else (accuracy, control_accuracy)
    return ProbeResult(
        weight=settings.weight,
        rows=sums[:, 0, 0].sum(),
        r2=r2[:k],
        r2_folds=probe.scores_by_fold.r2[:, :k],
        pearson=scores.pearson[:k],
        rmse=scores.rmse[:k],
        v_information=scores.v_information[:k],
        control_r2=control,
        selectivity=gained[0] - gained[1].clamp_min(0.0).nan_to_num(0.0),
        evidence=evidence_per_row(total.sums, total.system, d)[:k],
        description_length=description_length(probe.folds, d)[:k],
        best_lambda=probe.lambdas[probe.chosen[:, :k]],
        weights=weights[:, :k],
        intercept=(intercept + offset)[:k],
        accuracy=accuracy,
        accuracy_error=(accuracy * (1 - accuracy) / max(len(correct), 1)).sqrt(),
        control_accuracy=control_accuracy,
        evaluated=torch.tensor(len(correct)),
    )


def check_sums(sums: Tensor, shift: Tensor, settings: ProbeSettings) -> None:
    """Raise an error for sums that allow no fit.

    Raises:
        ValueError: With the problem.
    """
    d, k = settings.num_features, settings.num_targets
    count = int(sums[:, 0, 0].sum())
    if not count:
        raise ValueError("`features` must have rows, got none; was `update` called, and did the mask leave any?")
    finite = torch.isfinite(sums[:, 0, 1:]).all(dim=0) & torch.isfinite(shift)
    if not bool(finite[:d].all()):
        raise ValueError(
            f"`features` must be finite, got NaN or infinity in column {int((~finite[:d]).long().argmax())}"
        )
    if not bool(finite[d:].all()):
        raise ValueError(
            f"`targets` must be finite, got NaN or infinity in column {int((~finite[d:]).long().argmax())}"
        )
    used = int((sums[:, 0, 0] > 0).sum())
    if used < MIN_FOLDS:
        raise ValueError(
            f"`groups` must fill at least {MIN_FOLDS} of `folds`={settings.folds}, got {used}: {count} rows of too few "
            "groups; gather more, or let `groups` tell samples apart"
        )
    if k > count:
        raise ValueError(f"`targets` must have no more columns than there are rows, got {k} columns and {count} rows")
    total = sums.sum(dim=0)
    squares = total.diagonal()[1 + d : 1 + d + k] / count
    mean = total[0, 1 + d : 1 + d + k] / count
    reference = squares + shift[d : d + k].square()
    constant = (squares - mean.square()) <= 64 * torch.finfo(sums.dtype).eps * reference
    if settings.task == "regression" and bool(constant.any()):
        raise ValueError(f"`targets` must vary, got one value throughout in column {int(constant.long().argmax())}")
    if settings.task == "classification" and int((~constant).sum()) < 2:
        raise ValueError("`targets` must be of at least two classes, got one")


def _judge(
    probe: CrossValidation, sample: Tensor, settings: ProbeSettings, has_rows: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Return which stored rows are classified correctly, and which for the first control; none for a regression."""
    d, k = settings.num_features, settings.num_targets
    nothing = torch.zeros(0, dtype=torch.bool)
    if settings.task != "classification":
        return nothing, nothing
    number = has_rows.long().cumsum(dim=0) - 1  # folds without rows are not counted
    folds = number[sample[:, 0].long()]
    features, targets = sample[:, 1 : 1 + d] - shift[:d], sample[:, 1 + d :]

    def judged(columns: slice) -> Tensor:
        # indicators were shifted like all columns, so the intercept of a class lacks the shift of its indicator
        rows = KeptRows(features, targets[:, columns].argmax(dim=1), folds)
        return correct_predictions(probe, rows, columns, shift[d:][columns], classifier=settings.classifier)

    controls = [judged(slice((1 + c) * k, (2 + c) * k)) for c in range(settings.controls)]
    return judged(slice(0, k)), torch.cat(controls) if controls else nothing
