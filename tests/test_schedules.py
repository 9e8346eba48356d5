"""Schedules are pure functions of progress: exact at the ends, between them in between, held outside."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_plugins import schedules
from lightning_plugins.schedules import (
    Constant,
    Cosine,
    Cubic,
    Exponential,
    Linear,
    Piecewise,
    Progress,
    Schedule,
    Warmup,
)

RAMPS = [Linear, Cosine, Exponential, Cubic]
VALUES = st.floats(-1e6, 1e6)
SAME_SIGN = st.tuples(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.sampled_from([-1.0, 1.0])).map(
    lambda drawn: (drawn[0] * drawn[2], drawn[1] * drawn[2])
)


def at(step, total=100):
    return Progress(step=step, epoch=0.0, total_steps=total)


@pytest.mark.parametrize(
    ("schedule", "expected"),  # at 0, 1/4, 1/2, 3/4 and 1 of training
    [
        (Constant(), [1.0] * 5),
        (Constant(-2), [-2.0] * 5),
        (Linear(1, 3), [1.0, 1.5, 2.0, 2.5, 3.0]),
        (Linear(3, 1, begin=0.25, until=0.75), [3.0, 3.0, 2.0, 1.0, 1.0]),
        (Cosine(0, 2), [0.0, 1 - math.sqrt(0.5), 1.0, 1 + math.sqrt(0.5), 2.0]),
        (Exponential(1, 16), [1.0, 2.0, 4.0, 8.0, 16.0]),
        (Exponential(-16, -1), [-16.0, -8.0, -4.0, -2.0, -1.0]),
        (Cubic(0, 64), [0.0, 37.0, 56.0, 63.0, 64.0]),
        (Cubic(1, 0), [1.0, 27 / 64, 1 / 8, 1 / 64, 0.0]),
        (Piecewise([0.25, 0.75], [1, 2, 3]), [1.0, 2.0, 2.0, 3.0, 3.0]),
        (Piecewise([], [7]), [7.0] * 5),
        (Warmup(0.5), [0.0, 0.5, 1.0, 1.0, 1.0]),
        (Warmup(0.5, Linear(4, 0)), [0.0, 1.5, 2.0, 1.0, 0.0]),
        (Warmup(0, Linear(4, 0)), [4.0, 3.0, 2.0, 1.0, 0.0]),
    ],
    ids=repr,
)
def test_values_by_hand(schedule, expected):
    assert [schedule(at(step)) for step in (0, 25, 50, 75, 100)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("unit", "progress"),
    [
        ("steps", Progress(step=15, epoch=0.0)),
        ("epochs", Progress(step=0, epoch=15.0)),
    ],
)
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda unit: Linear(0, 1, begin=10, until=20, unit=unit), 0.5),
        (lambda unit: Piecewise([15], [0, 3], unit=unit), 3.0),
        (lambda unit: Warmup(60, unit=unit), 0.25),
    ],
)
def test_units(make, unit, progress, expected):
    schedule = make(unit)
    assert schedule(progress) == expected
    assert not schedule.needs_total


def test_an_epoch_counts_in_parts():
    assert Linear(0, 1, until=4, unit="epochs")(Progress(step=0, epoch=1.5)) == 0.375


def test_a_fraction_is_of_steps_and_of_epochs_where_the_steps_are_unknown():
    schedule = Linear(0, 1)
    assert schedule(Progress(step=20, epoch=3.0, total_steps=80, total_epochs=4)) == 0.25
    assert schedule(Progress(step=20, epoch=3.0, total_epochs=4)) == 0.75
    assert schedule(Progress(step=0, epoch=0.0, total_steps=0, total_epochs=0)) == 0.0
    assert schedule(Progress(step=0, epoch=0.0, total_epochs=0)) == 0.0


@pytest.mark.parametrize("schedule", [Linear(0, 1), Piecewise([0.5], [0, 1]), Warmup(0.1)], ids=repr)
def test_a_fraction_of_a_training_without_end_is_refused(schedule):
    assert schedule.needs_total
    with pytest.raises(ValueError, match="`total_steps` and `total_epochs` are unknown"):
        schedule(Progress(step=5, epoch=0.5))


def test_a_warmup_needs_what_the_schedule_after_it_needs():
    assert not Warmup(5, Constant(), unit="steps").needs_total
    assert Warmup(5, Linear(1, 0), unit="steps").needs_total
    assert not Constant().needs_total


def test_an_empty_range_is_a_jump():
    schedule = Linear(1, 2, begin=5, until=5, unit="steps")
    assert [schedule(at(step)) for step in (4, 5, 6)] == [1.0, 2.0, 2.0]


@pytest.mark.parametrize("ramp", RAMPS)
@given(ends=SAME_SIGN, bounds=st.tuples(st.integers(0, 1000), st.integers(0, 1000)), step=st.integers(0, 2000))
def test_a_ramp_is_held_outside_and_stays_between_its_ends(ramp, ends, bounds, step):
    begin, until = sorted(bounds)
    value = ramp(*ends, begin=begin, until=until, unit="steps")(at(step))
    assert min(ends) <= value <= max(ends)
    if step >= until:
        assert value == ends[1]
    elif step <= begin:
        assert value == ends[0]


@pytest.mark.parametrize("ramp", RAMPS)
@given(ends=SAME_SIGN, steps=st.tuples(st.integers(0, 1000), st.integers(0, 1000)))
def test_a_ramp_is_monotone(ramp, ends, steps):
    schedule = ramp(*ends, until=1000, unit="steps")
    earlier, later = (schedule(at(step)) for step in sorted(steps))
    slack = 1e-12 * max(map(abs, ends))
    assert (later - earlier) * math.copysign(1, ends[1] - ends[0]) >= -slack


@pytest.mark.parametrize("ramp", [Linear, Cosine, Cubic])
@given(ends=st.tuples(VALUES, VALUES), step=st.integers(0, 1000))
def test_a_ramp_may_cross_zero(ramp, ends, step):
    assert min(ends) <= ramp(*ends, until=1000, unit="steps")(at(step)) <= max(ends)


@given(value=st.floats(1e-300, 1e300), step=st.integers(0, 1000))
@pytest.mark.parametrize("ramp", RAMPS)
def test_a_ramp_to_where_it_starts_is_constant(ramp, value, step):
    assert ramp(value, value, until=1000, unit="steps")(at(step)) == value


@pytest.mark.parametrize("ramp", RAMPS)
def test_a_ramp_over_the_whole_range_of_floats_is_finite(ramp):
    largest = 1.7976931348623157e308
    assert ramp(largest, largest)(at(37)) == largest
    assert math.isfinite(ramp(5e-324, largest)(at(37)))
    assert ramp is Exponential or math.isfinite(ramp(-largest, largest)(at(37)))


@given(step=st.integers(0, 200), boundaries=st.sets(st.integers(0, 150), max_size=6))
def test_piecewise_counts_the_boundaries_passed(step, boundaries):
    ordered = sorted(boundaries)
    schedule = Piecewise(ordered, range(len(ordered) + 1), unit="steps")
    assert schedule(at(step)) == sum(boundary <= step for boundary in ordered)


@given(step=st.integers(0, 200), duration=st.integers(0, 150))
def test_a_warmup_rises_and_then_leaves_the_schedule_alone(step, duration):
    inner = Cosine(2, 1, until=200, unit="steps")
    value = Warmup(duration, inner, unit="steps")(at(step))
    assert 0 <= value <= inner(at(step))
    assert step < duration or value == inner(at(step))


@pytest.mark.parametrize(
    "schedule",
    [
        Constant(2),
        Linear(0, 1),
        Cosine(0, 1, begin=3, until=5, unit="epochs"),
        Exponential(1, 2, until=7, unit="steps"),
        Cubic(0, 1),
        Piecewise([1, 2], [0, 1, 2], unit="epochs"),
        Warmup(5, Linear(1, 0), unit="steps"),
        Warmup(0.1),
    ],
    ids=repr,
)
def test_the_repr_holds_every_argument(schedule):
    assert repr(eval(repr(schedule), vars(schedules))) == repr(schedule)
    assert vars(eval(repr(schedule), vars(schedules))).keys() == vars(schedule).keys()


def test_the_repr_does_not_depend_on_how_a_number_was_written():
    assert repr(Linear(0, 1, until=5, unit="steps")) == repr(Linear(0.0, 1.0, begin=0.0, until=5.0, unit="steps"))
    assert repr(Linear(0, 1)) == "Linear(start=0.0, end=1.0, begin=0.0, until=1.0, unit='fraction')"


def test_a_schedule_of_ones_own():
    class Half(Schedule):
        def __init__(self, period):
            self.period = period

        def __call__(self, progress):
            return 0.5 ** (progress.step // self.period)

    assert Warmup(0, Half(2), unit="steps")(at(5)) == 0.25
    assert repr(Half(2)) == "Half(period=2)"
    assert not Half(2).needs_total


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Constant(math.nan), ValueError, "`value` must be finite, got nan"),
        (lambda: Constant("1"), TypeError, "`value` must be a number"),
        (lambda: Linear(math.inf, 1), ValueError, "`start` must be finite, got inf"),
        (lambda: Linear(0, None), TypeError, "`end` must be a number, got None"),
        (lambda: Linear(0, 1, unit="epoch"), ValueError, r"`unit` must be .*, got 'epoch'; did you mean 'epochs'\?"),
        (lambda: Linear(0, 1, unit="step", until=3), ValueError, r"did you mean 'steps'\?"),
        (lambda: Linear(0, 1, unit="steps"), ValueError, "`until` must be given with `unit='steps'`"),
        (
            lambda: Linear(0, 1, until=30),
            ValueError,
            r"`until` must be in \[0, 1\], got 30; .* \(with `unit='fraction'`",
        ),
        (lambda: Linear(0, 1, begin=-0.1), ValueError, r"`begin` must be in \[0, 1\], got -0\.1"),
        (lambda: Linear(0, 1, begin=-1, until=2, unit="steps"), ValueError, "`begin` must be at least 0, got -1"),
        (lambda: Linear(0, 1, begin=0.8, until=0.5), ValueError, r"`begin` must not be after `until`, got begin=0\.8"),
        (lambda: Exponential(0, 1), ValueError, r"one sign and not be zero, got start=0, end=1; use `Linear`"),
        (lambda: Exponential(1, 0), ValueError, "one sign and not be zero"),
        (lambda: Exponential(-1, 1), ValueError, "one sign and not be zero, got start=-1, end=1"),
        (lambda: Piecewise([0.5, 0.5], [1, 2, 3]), ValueError, r"`boundaries` must rise, got \[0\.5, 0\.5\]"),
        (lambda: Piecewise([0.5], [1]), ValueError, "one entry more than `boundaries`: 2, got 1"),
        (lambda: Piecewise([5], [1, 2]), ValueError, r"`boundaries\[0\]` must be in \[0, 1\], got 5"),
        (lambda: Piecewise([0.5], [1, math.nan]), ValueError, r"`values\[1\]` must be finite, got nan"),
        (lambda: Piecewise("0.5", [1, 2]), TypeError, "`boundaries` must be a list of numbers, got '0.5'"),
        (lambda: Piecewise([0.5], 2), TypeError, "`values` must be a list of numbers, got 2"),
        (lambda: Piecewise([0.5], [1, 2], unit="percent"), ValueError, "`unit` must be"),
        (lambda: Warmup(-1, unit="steps"), ValueError, "`duration` must be at least 0, got -1"),
        (lambda: Warmup(100), ValueError, r"`duration` must be in \[0, 1\], got 100"),
        (
            lambda: Warmup(0.1, 0.5),
            TypeError,
            r"`after` must be a Schedule, got float; did you mean `Constant\(0\.5\)`",
        ),
        (lambda: Warmup(0.1, unit="frac"), ValueError, r"did you mean 'fraction'\?"),
    ],
)
def test_wrong_arguments_are_named(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_the_base_class_has_no_values():
    with pytest.raises(TypeError, match="abstract"):
        Schedule()
