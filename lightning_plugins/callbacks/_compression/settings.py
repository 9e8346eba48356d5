"""Settings of a compression under a budget, checked once for all callbacks that do it."""

from dataclasses import dataclass
from typing import Literal

from lightning_plugins._checks import check_choice, check_instance, plain_number
from lightning_plugins.callbacks._monitors.figures import check_figures
from lightning_plugins.callbacks._trainer.phases import Phase
from lightning_plugins.compression.budget.filling import ChoiceSettings
from lightning_plugins.compression.budget.settings import ChoiceRates
from lightning_plugins.schedules import Cubic, Linear, Schedule

Criterion = Literal["learned", "magnitude"]
CRITERIA: tuple[Criterion, ...] = ("learned", "magnitude")


@dataclass(frozen=True, kw_only=True)
class CompressionSettings(ChoiceSettings):
    """The arguments of `HybridCompression`, and those that only one of the others has.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of the wrong type.
    """

    cost: Literal["params", "flops"]
    phase: Phase
    figures: bool
    criterion: Criterion = "learned"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("criterion", self.criterion, CRITERIA)
        check_instance("phase", self.phase, Phase, "a Phase, such as Phase(begin=0.1, end=0.7)")
        self._check_rates()
        object.__setattr__(self, "budget", plain_number(self.budget))
        check_figures(self.figures)

    @property
    def learned(self) -> bool:
        """True if gradients choose."""
        return self.criterion == "learned"

    @property
    def way(self) -> Schedule:
        """Progress of the choice, from 0 to 1, as a function of training progress."""
        phase = self.phase
        if phase.schedule is not None:
            return phase.schedule
        shape = Linear if self.learned else Cubic
        return shape(0.0, 1.0, begin=phase.begin, until=phase.end, unit=phase.unit)

    def _check_rates(self) -> None:
        """Refuse rates of what this choice does without."""
        ranks = self.ranks
        uses = {"scores": self.masks, "thresholds": ranks, "beta_max": True, "refresh_every": ranks}
        uses["update_every"] = not ranks  # which only magnitudes use
        for name in [name for name, used in uses.items() if not used]:
            value = getattr(self.rates, name)
            if value != getattr(ChoiceRates(), name):
                known = ", ".join(f"`{one}`" for one, used in uses.items() if used)
                raise ValueError(f"`rates`: only {known} have an effect here, got {name}={value!r}")
