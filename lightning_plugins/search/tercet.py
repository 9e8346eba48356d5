"""An early termination rule that compares a learning curve with earlier curves at two checkpoints."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lightning_plugins._arguments import check_arguments
from lightning_plugins._checks import check_choice, check_fraction, check_positive_int


@dataclass(frozen=True)
class TercetRule:
    """Stop a training run whose learning curve is below a quantile of the earlier curves.

    At each of the ``fractions`` of a run the mean of its curve since the previous fraction is compared with the same
    mean of the other curves; it continues if it is not worse than their quantile. With the defaults the worst tenth
    stops at half of the training, and all but the best tenth at 90 %, with their value so far as result.

    Args:
        fractions: Checkpoints, ascending, in (0, 1).
        quantiles: Quantiles of quality, one per checkpoint, in [0, 1): 0.1 stops the worst tenth, 0.9 all but the best
            tenth.
        min_curves: Minimum number of other curves that have reached a checkpoint; with fewer nothing is stopped.
        mode: Whether large values (``"max"``) or small ones (``"min"``) are better.

    Raises:
        ValueError: If the fractions do not ascend, the number of quantiles differs, or a number is out of range.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> rule = TercetRule(min_curves=3, mode="max")
        >>> others = [[0.6, 0.7, 0.8, 0.9], [0.5, 0.6, 0.7, 0.8], [0.7, 0.7, 0.9, 0.9]]
        >>> rule.ends([0.1, 0.2], others, total=4), rule.ends([0.6, 0.7], others, total=4)
        (True, False)

    Source:
        Cho et al., https://arxiv.org/abs/2202.03005. The authors' code uses the second quantile at both looks in some
        benchmarks: ``quantiles=(0.9, 0.9)``.
    """

    fractions: tuple[float, ...] = (0.5, 0.9)
    quantiles: tuple[float, ...] = (0.1, 0.9)
    min_curves: int = 4
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        """Check the arguments."""
        for name in ("fractions", "quantiles"):
            numbers = getattr(self, name)
            if not isinstance(numbers, tuple | list) or not numbers:
                raise TypeError(f"`{name}` must be a tuple of numbers, got {numbers!r}")
            object.__setattr__(self, name, tuple(check_fraction(f"{name}[{i}]", x) for i, x in enumerate(numbers)))
        if any(a >= b for a, b in zip((0.0, *self.fractions), (*self.fractions, 1.0), strict=True)):
            raise ValueError(f"`fractions` must ascend between 0 and 1, got {self.fractions}")
        if len(self.quantiles) != len(self.fractions):
            raise ValueError(
                f"`quantiles` must have one number for each of {len(self.fractions)} fractions, got {self.quantiles}"
            )
        check_positive_int("min_curves", self.min_curves)
        check_choice("mode", self.mode, ("min", "max"))

    def looks(self, total: int) -> list[int]:
        """Return after how many values of a complete run each checkpoint is.

        Args:
            total: The number of values of a complete run.
        """
        check_positive_int("total", total)
        return [max(1, math.floor(fraction * total)) for fraction in self.fractions]

    def ends(self, curve: Sequence[float], others: Sequence[Sequence[float]], total: int) -> bool:
        """Tell whether to stop a training run at this point.

        Args:
            curve: Its values so far, one per epoch; NaN counts as the worst value.
            others: The curves of other runs, complete or not.
            total: The number of values of a complete run.

        Returns:
            True if this is a checkpoint and the curve is below the quantile.
        """
        check_arguments(TercetRule.ends, locals())
        curve = [float(value) for value in curve]
        looks = self.looks(total)
        if len(curve) not in looks:
            return False
        look = looks.index(len(curve))
        part = slice(looks[look - 1] if look else 0, len(curve))
        reached = [self._mean(other[part]) for other in others if len(other) >= len(curve)]
        if len(reached) < self.min_curves:
            return False
        return self._mean(curve[part]) < _quantile(reached, self.quantiles[look])

    def _mean(self, values: Sequence[float]) -> float:
        mean = float(np.mean(values))
        if math.isnan(mean):
            return -math.inf
        return mean if self.mode == "max" else -mean


def _quantile(values: Sequence[float], quantile: float) -> float:
    """The linearly interpolated quantile, without interpolating between infinite values."""
    ordered = np.sort(np.asarray(values))
    below = ordered[math.floor(quantile * (len(ordered) - 1))]
    return float(np.quantile(ordered, quantile)) if np.isfinite(below) else float(below)
