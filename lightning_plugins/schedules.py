"""Values as functions of training progress.

Positions are given in ``unit``: ``"steps"`` (optimizer steps done), ``"epochs"`` (1.5 is the middle of the second one),
or ``"fraction"`` of the whole training, from 0 to 1, which requires a known training length. A schedule has no state,
so a resumed run continues correctly; its ``repr`` contains all of its arguments.
"""

import itertools
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal, NamedTuple

from lightning_plugins._checks import check_choice, check_finite_number, check_fraction

Unit = Literal["steps", "epochs", "fraction"]
UNITS: tuple[Unit, ...] = ("steps", "epochs", "fraction")


class Progress(NamedTuple):
    """Progress of training.

    Attributes:
        step: Optimizer steps done; batches under manual optimization, where several optimizers may step.
        epoch: Epochs done, the current one as a fraction.
        total_steps: Total number of steps of the training, None if unknown.
        total_epochs: Total number of epochs, None if unknown.
        fraction: The completed fraction of the training, if it is not ``step / total_steps``.
    """

    step: int
    epoch: float
    total_steps: int | None = None
    total_epochs: int | None = None
    fraction: float | None = None


class Schedule(ABC):
    """A value as a function of training progress; subclass it and define ``__call__`` for a custom schedule.

    Store every constructor argument, and nothing else, as an attribute: the ``repr`` shows the attributes, and
    callbacks use it to recognise the schedule they were saved with.
    """

    @abstractmethod
    def __call__(self, progress: Progress) -> float:
        """Return the value at ``progress``."""

    @property
    def needs_total(self) -> bool:
        """True if the schedule uses fractions of training, which need a known length."""
        return getattr(self, "unit", None) == "fraction"

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"


class Constant(Schedule):
    """A constant value.

    Args:
        value: The value.

    Raises:
        TypeError: If ``value`` is not a number.
        ValueError: If ``value`` is not finite.

    Example:
        >>> Constant(0.5)(Progress(step=7, epoch=1.0))
        0.5
    """

    def __init__(self, value: float = 1.0) -> None:
        self.value = float(check_finite_number("value", value))

    def __call__(self, progress: Progress) -> float:
        """Return the value, whatever the ``progress``."""
        return self.value


class _Ramp(Schedule):
    """From ``start`` at ``begin`` to ``end`` at ``until``; subclasses define the interpolation."""

    def __init__(
        self, start: float, end: float, *, begin: float = 0.0, until: float | None = None, unit: Unit = "fraction"
    ) -> None:
        self.start = float(check_finite_number("start", start))
        self.end = float(check_finite_number("end", end))
        check_choice("unit", unit, UNITS)
        if until is None and unit != "fraction":
            raise ValueError(f"`until` must be given with `unit={unit!r}`; only fractions have a default end, 1.0")
        self.begin = check_position("begin", begin, unit)
        self.until = check_position("until", 1.0 if until is None else until, unit)
        self.unit = unit
        if self.begin > self.until:
            raise ValueError(f"`begin` must not be after `until`, got begin={begin!r}, until={self.until!r}")

    def __call__(self, progress: Progress) -> float:
        """Return the value at ``progress``: ``start`` up to ``begin`` and ``end`` from ``until`` on."""
        position = _position(progress, self.unit)
        if position >= self.until:  # first, so that an empty range is a jump
            return self.end
        if position <= self.begin:
            return self.start
        value = self._between((position - self.begin) / (self.until - self.begin))
        return min(max(value, min(self.start, self.end)), max(self.start, self.end))  # rounding may overshoot an end

    @abstractmethod
    def _between(self, t: float) -> float:
        """Return the value at the interpolation parameter ``t`` in [0, 1]."""

    def _mix(self, share: float) -> float:
        return self.start * (1 - share) + self.end * share  # not start + (end - start) * share, which may overflow


class Linear(_Ramp):
    """Linear interpolation from ``start`` to ``end``; constant before ``begin`` and after ``until``.

    Args:
        start: Value up to ``begin``.
        end: Value from ``until`` on.
        begin: Start of the change, in ``unit``.
        until: End of the change, in ``unit``; by default the end of training, only possible with fractions.
        unit: ``"steps"``, ``"epochs"`` or ``"fraction"`` (of the whole training).

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a value is not finite, a position is out of range, or ``begin`` is after ``until``.

    Example:
        >>> Linear(0.0, 1.0, begin=10, until=20, unit="steps")(Progress(step=15, epoch=0.0))
        0.5
    """

    def _between(self, t: float) -> float:
        return self._mix(t)


class Cosine(_Ramp):
    """Half a cosine wave from ``start`` to ``end``, flat at both ends; arguments as for `Linear`.

    Example:
        >>> Cosine(1.0, 0.0)(Progress(step=25, epoch=0.0, total_steps=100))
        0.8535533905932737
    """

    def _between(self, t: float) -> float:
        return self._mix((1 - math.cos(math.pi * t)) / 2)


class Exponential(_Ramp):
    """Geometric interpolation: equal factors in equal times; arguments as for `Linear`.

    Raises:
        ValueError: Also if ``start`` and ``end`` are not of one sign, or one of them is zero.

    Example:
        >>> round(Exponential(1.0, 100.0)(Progress(step=50, epoch=0.0, total_steps=100)), 6)
        10.0
    """

    def __init__(
        self, start: float, end: float, *, begin: float = 0.0, until: float | None = None, unit: Unit = "fraction"
    ) -> None:
        super().__init__(start, end, begin=begin, until=until, unit=unit)
        if self.start == 0 or self.end == 0 or (self.start > 0) != (self.end > 0):
            raise ValueError(
                f"`start` and `end` must have one sign and not be zero, got start={start!r}, end={end!r}; "
                "use `Linear` or `Cosine` to reach zero or to cross it"
            )

    def _between(self, t: float) -> float:
        logarithm = math.log(abs(self.start)) * (1 - t) + math.log(abs(self.end)) * t
        try:
            return math.copysign(math.exp(logarithm), self.start)
        except OverflowError:  # close to the largest float: rounded up from an end
            return math.copysign(math.inf, self.start)


class Cubic(_Ramp):
    """Fast at first and flat at the end: ``end + (start - end) (1 - t)^3``; arguments as for `Linear`.

    Example:
        >>> Cubic(0.0, 0.8)(Progress(step=50, epoch=0.0, total_steps=100))  # 7/8 of the way at half time
        0.7000000000000001

    Source:
        Zhu & Gupta, 2017, https://arxiv.org/abs/1710.01878, where it is the sparsity of gradual pruning.
    """

    def _between(self, t: float) -> float:
        return self._mix(1 - (1 - t) ** 3)


class Piecewise(Schedule):
    """A piecewise constant value; at a boundary the later value applies.

    Args:
        boundaries: Positions at which the value changes, in ``unit``, increasing.
        values: The values, one more than there are boundaries.
        unit: ``"steps"``, ``"epochs"`` or ``"fraction"`` (of the whole training).

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the boundaries do not increase, a position is out of range, or the counts do not match.

    Example:
        >>> schedule = Piecewise([2, 5], [0.0, 0.1, 0.05], unit="epochs")
        >>> [schedule(Progress(step=0, epoch=epoch)) for epoch in (1.9, 2.0, 7.0)]
        [0.0, 0.1, 0.05]
    """

    def __init__(self, boundaries: Sequence[float], values: Sequence[float], *, unit: Unit = "fraction") -> None:
        check_choice("unit", unit, UNITS)
        for name, numbers in (("boundaries", boundaries), ("values", values)):
            if isinstance(numbers, str) or not isinstance(numbers, Sequence):
                raise TypeError(f"`{name}` must be a list of numbers, got {numbers!r}")
        self.boundaries = [check_position(f"boundaries[{i}]", b, unit) for i, b in enumerate(boundaries)]
        self.values = [float(check_finite_number(f"values[{i}]", value)) for i, value in enumerate(values)]
        self.unit = unit
        if any(left >= right for left, right in itertools.pairwise(self.boundaries)):
            raise ValueError(f"`boundaries` must rise, got {boundaries!r}")
        if len(values) != (wanted := len(boundaries) + 1):
            raise ValueError(f"`values` must have one entry more than `boundaries`: {wanted}, got {len(values)}")

    def __call__(self, progress: Progress) -> float:
        """Return the value at ``progress``."""
        return self.values[bisect_right(self.boundaries, _position(progress, self.unit))]


class Warmup(Schedule):
    """A linear rise from zero over ``duration``, multiplied by the schedule ``after``, which applies alone afterwards.

    ``after`` receives the progress since the start of training, not since the end of the warm-up.

    Args:
        duration: Length of the warm-up, in ``unit``; 0 for none.
        after: The schedule to warm up to; by default the constant 1.
        unit: ``"steps"``, ``"epochs"`` or ``"fraction"`` (of the whole training).

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``duration`` is out of range.

    Example:
        >>> schedule = Warmup(10, after=Constant(0.5), unit="steps")
        >>> [schedule(Progress(step=step, epoch=0.0)) for step in (0, 5, 10, 99)]
        [0.0, 0.25, 0.5, 0.5]
    """

    def __init__(self, duration: float, after: Schedule | None = None, *, unit: Unit = "fraction") -> None:
        check_choice("unit", unit, UNITS)
        if after is not None and not isinstance(after, Schedule):
            raise TypeError(
                f"`after` must be a Schedule, got {type(after).__name__}; did you mean `Constant({after!r})`?"
            )
        self.duration = check_position("duration", duration, unit)
        self.after = Constant() if after is None else after
        self.unit = unit

    @property
    def needs_total(self) -> bool:
        """True if this schedule or the one after it counts in fractions of training."""
        return self.unit == "fraction" or self.after.needs_total

    def __call__(self, progress: Progress) -> float:
        """Return the value at ``progress``."""
        position = _position(progress, self.unit)
        return self.after(progress) * (position / self.duration if position < self.duration else 1.0)


def check_position(name: str, value: float, unit: Unit) -> float:
    """Return a position in ``unit`` as a float, so that 1 and 1.0 have the same ``repr``."""
    if unit == "fraction":
        try:
            return float(check_fraction(name, value))
        except ValueError as error:
            raise ValueError(f"{error} (with `unit='fraction'`; 'steps' and 'epochs' count further)") from None
    if check_finite_number(name, value) < 0:
        raise ValueError(f"`{name}` must be at least 0, got {value!r}")
    return float(value)


def _position(progress: Progress, unit: Unit) -> float:
    if unit != "fraction":
        return progress.step if unit == "steps" else progress.epoch
    if progress.fraction is not None:
        return progress.fraction
    for done, total in ((progress.step, progress.total_steps), (progress.epoch, progress.total_epochs)):
        if total is not None:
            return done / max(total, 1)
    raise ValueError(
        "`unit='fraction'` needs the length of training, but `total_steps` and `total_epochs` are unknown (as with "
        "max_epochs=-1); use `unit='steps'` or `unit='epochs'`"
    )
