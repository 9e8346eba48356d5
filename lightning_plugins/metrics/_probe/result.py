"""Results of a probe."""

from typing import NamedTuple

import torch
from torch import Tensor


class ProbeResult(NamedTuple):
    """Results of a linear probe on held-out folds; per target, or scalars for a single target.

    Attributes:
        weight: ``"token"`` or ``"group"``: the meaning of a row.
        rows: Number of rows: tokens, or groups.
        r2: Coefficient of determination of the held-out predictions of all folds together, against the mean of all
            rows.
        r2_folds: By fold, against the mean of the fold, shape ``(F, k)``; NaN for a fold of one row.
        pearson: Correlation of held-out predictions and targets within folds.
        rmse: Root mean squared error of the held-out predictions, in the target's unit.
        v_information: Gaussian V-information in nats, ``-0.5 * log(1 - r2)``.
        control_r2: R² for one random number per group, mean over the controls; NaN without controls. Usually not above
            0.
        selectivity: ``r2`` minus ``control_r2``, the latter clipped at 0; accuracies instead for classification.
        evidence: Largest log evidence in nats per row, as LogME.
        description_length: Nats per row of a prequential code of the standardised targets; 1.419 for uninformative
            features.
        best_lambda: The penalty chosen by the other folds, shape ``(F, k)``.
        weights: Weights of a refit on all rows, shape ``(d, k)``, for raw features.
        intercept: Its intercept, shape ``(k,)``.
        accuracy: Held-out accuracy of a classification; NaN for a regression.
        accuracy_error: Its binomial standard error.
        control_accuracy: Held-out accuracy for one random class per group.
        evaluated: Number of rows used for the accuracy.
    """

    weight: str
    rows: Tensor
    r2: Tensor
    r2_folds: Tensor
    pearson: Tensor
    rmse: Tensor
    v_information: Tensor
    control_r2: Tensor
    selectivity: Tensor
    evidence: Tensor
    description_length: Tensor
    best_lambda: Tensor
    weights: Tensor
    intercept: Tensor
    accuracy: Tensor
    accuracy_error: Tensor
    control_accuracy: Tensor
    evaluated: Tensor

    def headline(self) -> dict[str, Tensor]:
        """Scalars to log, means over targets; the score for comparing layers comes first."""
        names: tuple[str, ...] = (
            "r2",
            "selectivity",
            "pearson",
            "rmse",
            "v_information",
            "evidence",
            "description_length",
            "control_r2",
        )
        if self.evaluated > 0:
            names = ("accuracy", "selectivity", "control_accuracy")
        values = {name: getattr(self, name).mean() for name in names}
        return {
            name: value for name, value in values.items() if not name.startswith("control") or not torch.isnan(value)
        }

    @property
    def score(self) -> float:
        """The score for comparing layers: mean R² over targets, or accuracy."""
        return float(next(iter(self.headline().values())))
