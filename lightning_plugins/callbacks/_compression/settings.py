"""What a compression under a budget is told, checked once for all callbacks that do it."""

from dataclasses import dataclass
from typing import Any, Literal

from lightning_plugins._checks import check_choice, check_finite_number, check_positive_int, plain_number
from lightning_plugins.callbacks._monitors.figures import check_figures
from lightning_plugins.callbacks._trainer.phases import check_phases
from lightning_plugins.compression.budget.choice import ChoiceRates
from lightning_plugins.compression.costs.layer_costs import COSTS
from lightning_plugins.plots import require_matplotlib
from lightning_plugins.schedules import Cubic, Linear, Schedule, Unit
from lightning_plugins.selection import check_layers

Criterion = Literal["learned", "magnitude"]
CRITERIA: tuple[Criterion, ...] = ("learned", "magnitude")


_NUMBERS = (
    *("budget", "begin", "end", "minimum", "multiple"),
    *("learning_rate", "threshold_learning_rate", "beta_max", "update_every", "refresh_every"),
)


@dataclass(frozen=True, kw_only=True)
class CompressionSettings:
    """The arguments of `HybridCompression`, and those that only one of the others has.

    Attributes:
        masks: Whether channels are chosen.
        ranks: Whether ranks are.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of the wrong type.
        ImportError: If figures are wanted and matplotlib is missing.
    """

    layers: str | list[str]
    budget: float
    cost: Literal["params", "flops"]
    schedule: Schedule | None
    begin: float
    end: float
    unit: Unit
    keep: str | list[str] | None
    minimum: int
    multiple: int
    figures: bool
    masks: bool = False
    ranks: bool = False
    learning_rate: float = 0.05
    threshold_learning_rate: float = 0.001
    beta_max: float = 100.0
    criterion: Criterion = "learned"
    update_every: int = 10
    refresh_every: int = 1

    def __post_init__(self) -> None:
        numbers = {"min_channels" if self.masks else "min_rank": self.minimum, "multiple_of": self.multiple}
        check_selection(self.layers, self.keep, self.budget, self.cost, **numbers)
        check_choice("criterion", self.criterion, CRITERIA)
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
        for name, number in (("update_every", self.update_every), ("refresh_every", self.refresh_every)):
            check_positive_int(name, number)
        for name in _NUMBERS:
            object.__setattr__(self, name, plain_number(getattr(self, name)))
        check_figures(self.figures)
        if self.figures:
            require_matplotlib()

    @property
    def learned(self) -> bool:
        """Whether gradients choose."""
        return self.criterion == "learned"

    @property
    def way(self) -> Schedule:
        """How far the choice is, from 0 to 1, as a function of training progress."""
        if self.schedule is not None:
            return self.schedule
        shape = Linear if self.learned else Cubic
        return shape(0.0, 1.0, begin=self.begin, until=self.end, unit=self.unit)

    @property
    def rates(self) -> ChoiceRates:
        """How fast scores and thresholds move."""
        return ChoiceRates(scores=self.learning_rate, thresholds=self.threshold_learning_rate, beta_max=self.beta_max)


def check_selection(layers: Any, keep: Any, budget: float, cost: str, **numbers: int) -> None:
    """Check what is said of a network that is to become smaller.

    Args:
        layers: The layers to choose in.
        keep: The layers that stay as they are, or None.
        budget: The share of the cost that may be left.
        cost: What it is a share of.
        **numbers: Whole numbers above 0, by the names of their arguments.

    Raises:
        ValueError: If one is out of its range.
        TypeError: If one is of the wrong type.
    """
    check_layers(layers, sides=False)
    if keep is not None:
        try:
            check_layers(keep, sides=False)
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("`layers`", "`keep`")) from None
    if not 0 < check_finite_number("budget", budget) < 1:
        hint = f"; did you mean {budget / 100!r}?" if 1 < budget < 100 else ""
        raise ValueError(
            f"`budget`, the fraction of the cost that is left, must be more than 0 and less than 1, got {budget!r}"
            f"{hint}"
        )
    check_choice("cost", cost, COSTS)
    for name, number in numbers.items():
        check_positive_int(name, number)
