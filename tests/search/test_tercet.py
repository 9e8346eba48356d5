"""The rule of early termination, and the pruner that follows it."""

import math

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_plugins.search import TercetPruner, TercetRule

optuna.logging.set_verbosity(optuna.logging.WARNING)
TEN = [[0.1 * place + 0.01 * epoch for epoch in range(10)] for place in range(10)]  # ten curves, each above the last


def test_the_worst_tenth_ends_at_half_and_all_but_the_best_at_ninety_percent():
    rule = TercetRule(mode="max")
    decided = {look: [rule.ends(curve[:look], TEN, total=10) for curve in TEN] for look in range(1, 11)}
    assert decided[5] == [True] + [False] * 9
    assert decided[9] == [True] * 9 + [False]
    assert not any(any(decided[look]) for look in (1, 2, 3, 4, 6, 7, 8, 10))


@given(st.integers(0, 2**20), st.integers(4, 40), st.floats(0.05, 0.95), st.sampled_from(["min", "max"]))
def test_a_decision_is_the_comparison_of_a_mean_with_a_quantile(seed, total, quantile, mode):
    rng = np.random.default_rng(seed)
    rule = TercetRule((0.5,), (quantile,), min_curves=3, mode=mode)
    others, curve = rng.random((7, total)), rng.random(total)
    half = max(1, math.floor(total / 2))
    sign = 1 if mode == "max" else -1
    means = sorted(sign * others[:, :half].mean(1))
    expected = sign * curve[:half].mean() < np.quantile(means, quantile)
    assert rule.ends(curve[:half].tolist(), others.tolist(), total) == expected


def test_the_second_look_is_at_the_part_since_the_first():
    rule = TercetRule((0.5, 0.75), (0.5, 0.5), min_curves=1, mode="max")
    other = [[9, 9, 1, 1]]
    assert rule.ends([0, 0, 2], other, total=4) is False  # 2 against 1, whatever came before
    assert rule.ends([9, 9, 0], other, total=4) is True


def test_small_is_good_where_told_so():
    rule = TercetRule(mode="min", min_curves=3)
    others = [[1.0] * 4, [2.0] * 4, [3.0] * 4]
    assert rule.ends([9.0, 9.0], others, total=4)
    assert not rule.ends([0.5, 0.5], others, total=4)


def test_nothing_ends_before_there_are_enough_curves_that_came_as_far():
    rule = TercetRule(min_curves=4, mode="max")
    others = [[1.0] * 10] * 3 + [[1.0] * 4]
    assert not rule.ends([0.0] * 5, others, total=10)
    assert rule.ends([0.0] * 5, [*others, [1.0] * 5], total=10)


def test_nan_and_infinite_curves_are_the_worst():
    rule = TercetRule(min_curves=4, mode="min")
    assert rule.ends([math.nan] * 5, TEN, total=10)
    diverged = [[math.inf] * 10] * 4
    assert not rule.ends([1.0] * 5, diverged, total=10)
    assert not rule.ends([math.inf] * 5, diverged, total=10)  # no worse than the others


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"fractions": 0.5}, TypeError, "`fractions` must be a tuple"),
        ({"fractions": ()}, TypeError, "`fractions` must be a tuple"),
        ({"fractions": (0.9, 0.5)}, ValueError, "`fractions` must ascend"),
        ({"fractions": (0.5, 1.0)}, ValueError, "`fractions` must ascend"),
        ({"fractions": (0.0, 0.9)}, ValueError, "`fractions` must ascend"),
        ({"fractions": (50, 0.9)}, ValueError, r"`fractions\[0\]` must be in \[0, 1\], got 50; did you mean 0.5"),
        ({"quantiles": (0.1,)}, ValueError, "`quantiles` must have one number for each of 2"),
        ({"quantiles": (0.1, "a")}, TypeError, r"`quantiles\[1\]` must be a number"),
        ({"min_curves": 0}, ValueError, "`min_curves` must be at least 1"),
        ({"mode": "maximum"}, ValueError, "`mode` must be .*did you mean 'max'"),
    ],
)
def test_bad_arguments_are_named(settings, error, match):
    with pytest.raises(error, match=match):
        TercetRule(**settings)


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_the_pruner_ends_the_trials_that_the_rule_ends(direction):
    sign = 1 if direction == "maximize" else -1
    study = optuna.create_study(direction=direction, pruner=TercetPruner(n_steps=10))
    stopped = {}

    def objective(trial):
        curve = TEN[trial.suggest_int("place", 0, 9)]
        for step, value in enumerate(curve):
            trial.report(sign * value, step)
            if trial.should_prune():
                stopped[trial.number] = step + 1
                raise optuna.TrialPruned
        return sign * value

    for place in (5, 6, 7, 8, 0, 9):
        study.enqueue_trial({"place": place})
    study.optimize(objective, n_trials=6)
    # four curves first; then the worst of all ends at half, the best goes on to the end
    assert stopped == {4: 5}
    rule = TercetRule(mode="max")
    assert rule.ends(TEN[0][:5], TEN[5:9], 10)
    assert not rule.ends(TEN[9][:9], [*TEN[5:9], TEN[0][:5]], 10)


def test_the_pruner_reads_other_trials_only_at_a_checkpoint(monkeypatch):
    study = optuna.create_study(pruner=TercetPruner(n_steps=10))
    read = []
    trials = study.get_trials
    trial = study.ask()
    monkeypatch.setattr(type(study), "get_trials", lambda self, **how: read.append(step) or trials(**how))
    for step in range(10):
        trial.report(1.0, step)
        trial.should_prune()
    assert [step + 1 for step in read] == TercetRule().looks(10) == [5, 9]


def test_the_pruner_names_bad_arguments():
    with pytest.raises(ValueError, match="`n_steps` must be at least 1"):
        TercetPruner(0)
    with pytest.raises(ValueError, match="`min_trials` must be at least 1"):
        TercetPruner(5, min_trials=0)
