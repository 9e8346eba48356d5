"""Settings of a compression under a budget, checked once for all callbacks that do it."""

from dataclasses import dataclass
from typing import Literal

from lightning_plugins._checks import check_choice, check_finite_number, check_positive_int, plain_number
from lightning_plugins.callbacks._monitors.figures import check_figures
from lightning_plugins.callbacks._trainer.phases import check_phases
from lightning_plugins.compression.budget.choice import ChoiceRates
from lightning_plugins.compression.budget.filling import ChoiceSettings
from lightning_plugins.schedules import Cubic, Linear, Schedule, Unit

Criterion = Literal["learned", "magnitude"]
CRITERIA: tuple[Criterion, ...] = ("learned", "magnitude")


_NUMBERS = (
    *("budget", "begin", "end", "min_channels", "multiple_of"),
    *("learning_rate", "threshold_learning_rate", "beta_max", "update_every", "refresh_every"),
)


@dataclass(frozen=True, kw_only=True)
class CompressionSettings(ChoiceSettings):
    """The arguments of `HybridCompression`, and those that only one of the others has.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of the wrong type.
    """

    cost: Literal["params", "flops"]
    schedule: Schedule | None
    begin: float
    end: float
    unit: Unit
    figures: bool
    learning_rate: float = 0.05
    threshold_learning_rate: float = 0.001
    beta_max: float = 100.0
    criterion: Criterion = "learned"
    update_every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("criterion", self.criterion, CRITERIA)
        if self.blocks is not None and not self.learned:
            raise ValueError(
                f"`blocks` must be None with criterion={self.criterion!r}, since the weights of blocks say nothing of "
                f"their use, got {self.blocks!r}; choose criterion='learned'"
            )
        if self.schedule is not None and not isinstance(self.schedule, Schedule):
            raise TypeError(
                f"`schedule` must be a Schedule from 0 to 1 such as `Linear(0.0, 1.0, begin=0.1, until=0.7)`, or None, "
                f"got {self.schedule!r}"
            )
        check_phases(self.unit, begin=self.begin, end=self.end)
        if self.begin == self.end:
            raise ValueError(f"`end` must be after `begin`, or nothing is chosen, got {self.end!r} for both")
        for name, rate in (
            ("learning_rate", self.learning_rate),
            ("threshold_learning_rate", self.threshold_learning_rate),
        ):
            if check_finite_number(name, rate) <= 0:
                raise ValueError(f"`{name}` must be positive, got {rate!r}")
        if check_finite_number("beta_max", self.beta_max) < 1:
            raise ValueError(
                f"`beta_max` must be at least 1, where the inverse temperature begins, got {self.beta_max!r}"
            )
        check_positive_int("update_every", self.update_every)
        for name in _NUMBERS:
            object.__setattr__(self, name, plain_number(getattr(self, name)))
        check_figures(self.figures)

    @property
    def learned(self) -> bool:
        """True if gradients choose."""
        return self.criterion == "learned"

    @property
    def way(self) -> Schedule:
        """Progress of the choice, from 0 to 1, as a function of training progress."""
        if self.schedule is not None:
            return self.schedule
        shape = Linear if self.learned else Cubic
        return shape(0.0, 1.0, begin=self.begin, until=self.end, unit=self.unit)

    @property
    def rates(self) -> ChoiceRates:
        """Step sizes of scores and thresholds."""
        return ChoiceRates(scores=self.learning_rate, thresholds=self.threshold_learning_rate, beta_max=self.beta_max)
