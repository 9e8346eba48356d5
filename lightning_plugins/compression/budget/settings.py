"""Limits and rates of a choice of channels and ranks, shared by the callbacks and the mixin that make one."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_plugins._checks import check_finite_number, check_positive_int, check_positive_number, plain_number
from lightning_plugins.selection import check_layers


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a choice of channels and ranks: which layers stay, and which sizes are possible.

    Attributes:
        keep: Layers that stay as they are: a name, a glob, several of them, or None.
        min_size: Minimum number of channels of a group, and minimum rank of a layer, at least 1.
        multiple_of: Numbers of channels and ranks are multiples of this, at least 1, for speed; heads are not rounded.

    Raises:
        ValueError: If a field is out of its range.
        TypeError: If a field is of the wrong type.

    Example:
        >>> Limits(keep="head", multiple_of=8)
        Limits(keep='head', min_size=1, multiple_of=8)
    """

    keep: str | Sequence[str] | None = None
    min_size: int = 1
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if self.keep is not None:
            try:
                check_layers(self.keep, sides=False)
            except (TypeError, ValueError) as error:
                raise type(error)(str(error).replace("`layers`", "`keep`")) from None
        for name in ("min_size", "multiple_of"):
            object.__setattr__(self, name, check_positive_int(name, getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class ChoiceRates:
    """Step sizes of scores and thresholds, and how often a choice is renewed.

    Attributes:
        scores: Step size of the mask scores, above 0, divided by the inverse temperature, so that a mask's logit moves
            by this much in a typical step.
        thresholds: Step size of the thresholds, above 0; they are shares of a layer's largest singular value.
        beta_max: The inverse temperature at the end of the choice, at least 1, where it begins.
        refresh_every: Steps between two decompositions of the weights whose ranks are chosen. 1 gives the exact
            gradient in every step, 4 on average, at half of the cost.
        update_every: Steps between two choices of channels by the magnitude of their weights.

    Raises:
        ValueError: If a field is out of its range.
        TypeError: If a field is of the wrong type.

    Example:
        >>> ChoiceRates(scores=0.1, beta_max=50).beta_max
        50
    """

    scores: float = 0.05
    thresholds: float = 0.001
    beta_max: float = 100.0
    refresh_every: int = 1
    update_every: int = 10

    def __post_init__(self) -> None:
        for name in ("scores", "thresholds"):
            check_positive_number(name, getattr(self, name))
        if check_finite_number("beta_max", self.beta_max) < 1:
            raise ValueError(
                f"`beta_max` must be at least 1, where the inverse temperature begins, got {self.beta_max!r}"
            )
        for name in ("refresh_every", "update_every"):
            check_positive_int(name, getattr(self, name))
        for name in vars(self):
            object.__setattr__(self, name, plain_number(getattr(self, name)))
