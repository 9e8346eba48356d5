"""Settings of a choice of channels and ranks under a budget, checked once for callbacks and mixin."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_plugins._checks import check_choice, check_finite_number, check_positive_int
from lightning_plugins.compression.costs.layer_costs import COSTS, Cost
from lightning_plugins.selection import check_layers


@dataclass(frozen=True, kw_only=True)
class ChoiceSettings:
    """The layers to choose in, and what may be left of a network.

    Attributes:
        layers: The layers to choose in: a name, a glob, or several.
        budget: The share of the network's cost that may be left.
        cost: ``"params"`` or ``"flops"``.
        masks: Whether channels are chosen.
        ranks: Whether ranks are.
        keep: Layers that stay as they are, or None.
        min_channels: The least number of units of a group, and the least rank.
        multiple_of: Numbers of units and ranks are multiples of this.
        refresh_every: In how many steps weights are decomposed once.

    Raises:
        ValueError: If one is out of its range.
        TypeError: If one is of the wrong type.
    """

    layers: str | Sequence[str] = "*"
    budget: float
    cost: Cost = "params"
    masks: bool = False
    ranks: bool = False
    keep: str | Sequence[str] | None = None
    min_channels: int = 1
    multiple_of: int = 1
    refresh_every: int = 1

    def __post_init__(self) -> None:
        check_layers(self.layers, sides=False)
        if self.keep is not None:
            try:
                check_layers(self.keep, sides=False)
            except (TypeError, ValueError) as error:
                raise type(error)(str(error).replace("`layers`", "`keep`")) from None
        if not 0 < check_finite_number("budget", self.budget) < 1:
            hint = f"; did you mean {self.budget / 100!r}?" if 1 < self.budget < 100 else ""
            raise ValueError(
                "`budget`, the fraction of the cost that is left, must be more than 0 and less than 1, got "
                f"{self.budget!r}{hint}"
            )
        check_choice("cost", self.cost, COSTS)
        least = "min_channels" if self.masks or not self.ranks else "min_rank"  # as callbacks for ranks alone call it
        check_positive_int(least, self.min_channels)
        check_positive_int("multiple_of", self.multiple_of)
        check_positive_int("refresh_every", self.refresh_every)
