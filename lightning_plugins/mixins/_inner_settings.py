"""Settings of the inner loop of a mixin for meta-learning."""

from dataclasses import dataclass
from typing import get_args

from lightning_plugins._checks import check_choice, check_finite_number, check_non_negative_int, check_positive_int
from lightning_plugins.meta import Vectorization
from lightning_plugins.meta.inner_loop import Rates
from lightning_plugins.meta.loop.arguments import check_first_order
from lightning_plugins.meta.loop.form import Vectorize, as_vectorization
from lightning_plugins.selection import check_layers


@dataclass(frozen=True, kw_only=True)
class InnerSettings:
    """Settings of the inner loop of `MAMLMixin` and `GAPMixin`.

    In YAML a mapping, without a class path: ``inner: {steps: 3, vectorize: {chunk_size: 2}}``.

    Attributes:
        steps: Number of inner steps in training, at least 1.
        evaluation_steps: Number of inner steps in validation, test and prediction.
        learning_rate: Learning rate of the inner steps, and initial value of learned rates.
        rates: ``"fixed"``, or ``"learned"`` for one learned rate per adapted tensor, ``"learned_per_step"`` for one
            per tensor and step; steps beyond ``steps`` use the last step's.
        first_order: Whether to treat the inner gradients as constants in the outer gradient.
        layers: Layers of the network to adapt: names or globs. None for all.
        vectorize: Whether the tasks are vectorised, or ``"auto"``; or a `lightning_plugins.meta.Vectorization`.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field is out of its range.

    Example:
        >>> InnerSettings(steps=3, learning_rate=0.1).evaluation_steps
        10
    """

    steps: int = 5
    evaluation_steps: int = 10
    learning_rate: float = 0.01
    rates: Rates = "fixed"
    first_order: bool = False
    layers: str | list[str] | None = None
    vectorize: Vectorize | Vectorization = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", check_positive_int("steps", self.steps))
        object.__setattr__(self, "evaluation_steps", check_non_negative_int("evaluation_steps", self.evaluation_steps))
        object.__setattr__(self, "learning_rate", check_finite_number("learning_rate", self.learning_rate))
        check_choice("rates", self.rates, get_args(Rates))
        check_first_order(self.first_order)
        if self.layers is not None:
            check_layers(self.layers)
        as_vectorization(self.vectorize)
