"""Settings of a linear probe."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_plugins._checks import (
    check_choice,
    check_finite_number,
    check_non_negative_int,
    check_positive_int,
    check_room,
    is_number,
    shown,
)

Task = Literal["regression", "classification"]
Weight = Literal["token", "group"]
Classifier = Literal["ridge", "lda", "softmax"]
TASKS: tuple[Task, ...] = ("regression", "classification")
WEIGHTS: tuple[Weight, ...] = ("token", "group")
CLASSIFIERS: tuple[Classifier, ...] = ("ridge", "lda", "softmax")
LAMBDAS = tuple(10.0 ** (exponent / 2) for exponent in range(-4, 13))
MIN_FOLDS = 3  # one held out, and two for choosing the penalty


@dataclass(frozen=True, kw_only=True)
class ProbeClassifier:
    """The classifier whose accuracy `LinearProbe` measures, and the rows stored for it.

    Attributes:
        kind: ``"ridge"``, ``"lda"`` or ``"softmax"``.
        reservoir: Maximum number of rows stored for measuring accuracies, at least 1.

    Raises:
        TypeError: If a field is of the wrong type.
        ValueError: If a field is out of its range.

    Example:
        >>> ProbeClassifier(kind="softmax").reservoir
        10000
    """

    kind: Classifier = "ridge"
    reservoir: int = 10_000

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, CLASSIFIERS)
        object.__setattr__(self, "reservoir", check_positive_int("reservoir", self.reservoir))


def as_classifier(classifier: Classifier | ProbeClassifier) -> ProbeClassifier:
    """Return the settings that an argument ``classifier`` stands for."""
    if isinstance(classifier, ProbeClassifier):
        return classifier
    check_choice("classifier", classifier, CLASSIFIERS)
    return ProbeClassifier(kind=classifier)


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of `LinearProbe`; documented there."""

    num_features: int
    num_targets: int
    task: Task
    weight: Weight
    folds: int
    controls: int
    lambdas: tuple[float, ...]
    classifier: Classifier
    reservoir: int
    seed: int

    def __post_init__(self) -> None:
        check_positive_int("num_features", self.num_features)
        check_positive_int("num_targets", self.num_targets)
        check_choice("task", self.task, TASKS)
        check_choice("weight", self.weight, WEIGHTS)
        if check_positive_int("folds", self.folds) < MIN_FOLDS:
            raise ValueError(
                f"`folds` must be at least {MIN_FOLDS}, one to report and two to choose the penalty in, got "
                f"{self.folds}"
            )
        check_non_negative_int("controls", self.controls)
        check_non_negative_int("seed", self.seed)
        for name in ("num_features", "num_targets", "controls"):
            check_room(name, getattr(self, name) ** 2)
        if self.task == "classification" and self.num_targets < 2:
            raise ValueError(
                f"`num_targets` must be the number of classes, at least 2, for classification, got {self.num_targets}"
            )

    @property
    def columns(self) -> int:
        """Columns of the sums: features, targets, and the targets of the controls."""
        return self.num_features + self.target_columns

    @property
    def target_columns(self) -> int:
        """Number of target columns including controls, each with one column per class for classification."""
        return self.num_targets + self.controls * (self.num_targets if self.task == "classification" else 1)

    @property
    def strengths(self) -> Tensor:
        """The penalties as a float64 tensor."""
        return torch.tensor(self.lambdas, dtype=torch.float64)


def check_penalties(lambdas: Sequence[float] | None) -> tuple[float, ...]:
    """Return the penalties in ascending order, or the default ones for None.

    Raises:
        TypeError: If they are not numbers.
        ValueError: If there are none, or one is negative or not finite.
    """
    if lambdas is None:
        return LAMBDAS
    if is_number(lambdas):
        raise TypeError(f"`lambdas` must be a sequence of numbers, got {lambdas!r}; did you mean [{lambdas!r}]?")
    if isinstance(lambdas, str | bytes) or not isinstance(lambdas, Sequence):
        raise TypeError(f"`lambdas` must be a sequence of numbers, got {shown(lambdas)}")
    checked = sorted(check_finite_number("lambdas", value) for value in lambdas)
    if not checked:
        raise ValueError("`lambdas` must have at least one penalty, got none; None takes the usual ones")
    if checked[0] < 0:
        raise ValueError(f"`lambdas` must be at least 0, got {checked[0]!r}")
    return tuple(map(float, checked))
