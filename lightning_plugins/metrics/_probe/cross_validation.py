"""Nested cross-validation of ridge regression from the folds' moments alone."""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_plugins.functional.ridge import (
    HeldOutSums,
    ProbeScores,
    RidgeSystem,
    held_out_sums,
    probe_scores,
    ridge_system,
)
from lightning_plugins.metrics._probe.moments import mean_and_scale, standardised


class Training(NamedTuple):
    """The normal equations of training rows, with their centring and scaling.

    Attributes:
        system: The system in the eigenbasis.
        mean: Of features and targets, shape ``(d + k,)``.
        scale: Of the same; targets are not scaled.
        sums: The rows' moments after that.
    """

    system: RidgeSystem
    mean: Tensor
    scale: Tensor
    sums: Tensor


class CrossValidation:
    """Predict every fold from the others, with the penalty chosen by inner folds among those others.

    Features are centred and scaled with the moments of the training rows, never with those of the predicted ones.

    Args:
        folds: Moments of the folds with rows, shape ``(F, p, p)``, with a common shift.
        num_features: ``d``; the other columns are targets.
        lambdas: Penalties, shape ``(L,)``.
    """

    def __init__(self, folds: Tensor, num_features: int, lambdas: Tensor) -> None:
        self.folds = folds
        self.num_features = num_features
        self.lambdas = lambdas

    @cached_property
    def total(self) -> Training:
        """All rows."""
        return self._train([])

    @cached_property
    def outer(self) -> list[Training]:
        """For each fold the rows of all others."""
        return [self._train([fold]) for fold in range(len(self.folds))]

    @cached_property
    def inner_errors(self) -> Tensor:
        """Mean squared errors on one fold after training without it and another one, shape ``(F, F, L, k)``.

        The first index is the outer held-out fold, the second the predicted fold; the diagonal, which is not used for
        the choice, is zero.
        """
        count = len(self.folds)
        errors = self.folds.new_zeros(count, count, len(self.lambdas), self.folds.shape[-1] - 1 - self.num_features)
        for first in range(count):
            for second in range(first):
                training = self._train([first, second])
                errors[first, second] = self._mean_squared_error(training, second)
                errors[second, first] = self._mean_squared_error(training, first)
        return errors

    @cached_property
    def chosen(self) -> Tensor:
        """Index of the penalty with the smallest mean error over the inner folds, shape ``(F, k)``."""
        return self.inner_errors.sum(dim=1).argmin(dim=1)

    @cached_property
    def outer_sums(self) -> list[HeldOutSums]:
        """For each fold the sums of its predictions from the others, for every penalty."""
        return [self._predict(training, fold) for fold, training in enumerate(self.outer)]

    @cached_property
    def chosen_sums(self) -> list[HeldOutSums]:
        """For each fold the sums of its predictions with the penalty chosen by the other folds, each ``(1, k)``."""
        return [
            HeldOutSums(*(v if v.ndim < 2 else v.gather(0, row[None]) for v in sums))
            for sums, row in zip(self.outer_sums, self.chosen, strict=True)
        ]

    @cached_property
    def scores_by_fold(self) -> ProbeScores:
        """Scores of each fold, each of shape ``(F, k)``."""
        picked = [probe_scores(sums) for sums in self.chosen_sums]
        return ProbeScores(*(torch.cat(values) for values in zip(*picked, strict=True)))

    @cached_property
    def scores(self) -> ProbeScores:
        """Scores of the predictions of all folds together, each of shape ``(k,)``; correlations are within folds."""
        d = self.num_features
        pooled = [own.moved(training.mean[d:]) for own, training in zip(self.chosen_sums, self.outer, strict=True)]
        within = [own.moved(-own.target / own.rows) for own in self.chosen_sums]
        # predictions centred within each fold: fold means do not contribute to a correlation within folds
        within = [own._replace(prediction=own.prediction * 0, prediction_squares=_about_mean(own)) for own in within]
        total = HeldOutSums(*(sum(values[1:], values[0]) for values in zip(*pooled, strict=True)))
        inside = HeldOutSums(*(sum(values[1:], values[0]) for values in zip(*within, strict=True)))
        scores = probe_scores(total)._replace(pearson=probe_scores(inside).pearson)
        return ProbeScores(*(value[0] for value in scores))

    @cached_property
    def final_choice(self) -> Tensor:
        """Index of the penalty with the smallest mean error over all folds, shape ``(k,)``, for the final refit."""
        errors = [sums.squared_error / sums.rows for sums in self.outer_sums]
        return torch.stack(errors).mean(dim=0).argmin(dim=0)

    def weights(self, training: Training, choice: Tensor) -> tuple[Tensor, Tensor]:
        """Weights ``(d, k)`` and intercepts ``(k,)`` for features shifted as in the sums."""
        d = self.num_features
        coefficients = training.system.coefficients(self.lambdas[choice][None])[0]
        weights = training.system.eigenvectors @ coefficients / training.scale[:d, None]
        return weights, training.mean[d:] - training.mean[:d] @ weights

    def _train(self, without: list[int]) -> Training:
        kept = [fold for fold in range(len(self.folds)) if fold not in without]
        sums = self.folds[kept].sum(dim=0)
        mean, scale = mean_and_scale(sums, self.num_features)
        own = standardised(sums, mean, scale)
        x, y = slice(1, 1 + self.num_features), slice(1 + self.num_features, None)
        return Training(ridge_system(own[x, x], own[x, y]), mean, scale, own)

    def _predict(self, training: Training, fold: int) -> HeldOutSums:
        held_out = standardised(self.folds[fold], training.mean, training.scale)
        weights = training.system.eigenvectors @ training.system.coefficients(self.lambdas)
        return held_out_sums(weights, held_out)

    def _mean_squared_error(self, training: Training, fold: int) -> Tensor:
        sums = self._predict(training, fold)
        return sums.squared_error / sums.rows


def _about_mean(sums: HeldOutSums) -> Tensor:
    return (sums.prediction_squares - sums.prediction.square() / sums.rows).clamp_min(0.0)
