"""Draws of noise and points of curves, by which attributions are scored."""

from dataclasses import dataclass

from lightning_plugins._checks import (
    check_bool,
    check_finite_number,
    check_non_negative_int,
    check_positive_int,
)


@dataclass(frozen=True, kw_only=True)
class NoiseDraws:
    """Gaussian noise that is added to inputs, to score attributions as predictions of its effect.

    Attributes:
        count: Number of draws per sample, at least 1.
        std: Standard deviation of the noise, above 0.
        seed: Seed of the noise, which depends on it and on the sample.

    Raises:
        TypeError: If a field is of the wrong type.
        ValueError: If a field is out of its range.

    Example:
        >>> NoiseDraws(count=20, std=0.2)
        NoiseDraws(count=20, std=0.2, seed=0)
    """

    count: int = 10
    std: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", check_positive_int("count", self.count))
        object.__setattr__(self, "seed", check_non_negative_int("seed", self.seed))
        if check_finite_number("std", self.std) <= 0:
            raise ValueError(f"`std` must be above 0, got {self.std!r}")


def as_noise(draws: int | NoiseDraws) -> NoiseDraws:
    """Return the noise that an argument ``draws`` stands for."""
    return draws if isinstance(draws, NoiseDraws) else NoiseDraws(count=check_positive_int("draws", draws))


@dataclass(frozen=True, kw_only=True)
class CurveSteps:
    """Points of a `perturbation_curve`, after the first.

    Attributes:
        count: Number of points, one patch each, at least 1; None for the number of patches. With more steps than
            patches the last points have all patches replaced.
        spread: Whether the steps are spread evenly, so that the last one replaces all patches.

    Raises:
        TypeError: If a field is of the wrong type.
        ValueError: If a field is out of its range.

    Example:
        >>> CurveSteps(count=10, spread=True).count
        10
    """

    count: int | None = None
    spread: bool = False

    def __post_init__(self) -> None:
        check_bool("spread", self.spread)
        if self.count is not None:
            check_positive_int("count", self.count)
