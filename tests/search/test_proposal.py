"""The decisions of a tiny search, replayed by hand."""

from unittest import mock

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lightning_plugins.search import proposal
from lightning_plugins.search.models.acquisition import acquire
from lightning_plugins.search.models.forest import ForestModel
from lightning_plugins.search.models.gaussian_process import GaussianProcessModel
from lightning_plugins.search.models.power_transform import transform_values
from lightning_plugins.search.proposal import ARMS, History, choose_arms, propose
from lightning_plugins.search.space import Space, key

SPACE = Space({"a": IntDistribution(0, 5), "b": CategoricalDistribution(("x", "y", "z")), "c": IntDistribution(0, 3)})
MODELS = {"forest": ForestModel, "gp": GaussianProcessModel}


def history(count, seed=0, space=SPACE):
    rng = np.random.default_rng(seed)
    points = []
    for _ in range(count):
        points.append(space.random(rng, points))
    points = np.array(points)
    return History(points, (points[:, 0] - 0.3) ** 2 + 0.1 * points[:, 1] + rng.random(count) * 0.01)


def by_hand(space, known, trial, rng):
    """The published loop in as few lines as it takes, with the same draws of chance."""
    y = transform_values(known.values)
    grid = [p for p in space._grid() if key(p) not in {key(q) for q in known.points}]
    first = ARMS[trial % 6]
    second = [arm for arm in ARMS if arm != first][rng.integers(5)]

    def scores(arm, candidates):
        model = MODELS[arm.model](space.features(known.points), y, rng)
        mean, variance = model.predict(space.features(np.array(candidates)))
        return acquire(arm.acquisition, mean, variance, y.min())

    order = np.argsort(-scores(first, grid), kind="stable")[:10]
    parents = [grid[i] for i in order]
    taken = {key(p) for p in known.points} | {key(p) for p in parents}
    ten = []
    for parent in parents:
        if rng.random() < 0.5:
            ten.append(parent)
            continue
        child = space.mutate(parent, rng)
        ten.append(parent if key(child) in taken else child)
        taken.add(key(child))
    return ten[int(np.argmax(scores(second, ten)))], (first, second)


@pytest.mark.parametrize("trial", range(2, 9))
def test_decisions_are_those_of_the_published_loop(trial):
    known = history(trial)
    expected, arms = by_hand(SPACE, known, trial, np.random.default_rng(trial))
    found = propose(SPACE, known, trial, np.random.default_rng(trial))
    np.testing.assert_array_equal(found.points[0], expected)
    assert found.arms == arms
    assert key(found.points[0]) not in {key(p) for p in known.points}


def test_arms_take_turns_and_the_second_is_another_one_drawn_uniformly():
    rng = np.random.default_rng(0)
    pairs = [choose_arms(trial, rng) for trial in range(6000)]
    assert [ARMS.index(first) for first, _ in pairs[:8]] == [0, 1, 2, 3, 4, 5, 0, 1]
    assert all(first != second for first, second in pairs)
    of_zero = np.array([ARMS.index(second) for first, second in pairs if first == ARMS[0]])
    np.testing.assert_allclose([(of_zero == arm).mean() for arm in range(6)], [0, *[0.2] * 5], atol=0.04)
    assert {(arm.model, arm.acquisition) for arm in ARMS} == {
        (m, a) for m in ("forest", "gp") for a in ("ei", "pi", "ucb")
    }


def test_about_half_of_the_parents_are_mutated():
    space = Space({f"x{i}": FloatDistribution(0, 1) for i in range(4)})
    rng = np.random.default_rng(0)
    parents = rng.random((10, 4))
    shares = [np.mean(proposal._mutate(space, parents, parents[:0], rng)[1]) for _ in range(300)]
    assert abs(np.mean(shares) - 0.5) < 0.03


def test_an_exhausted_space_is_tried_again():
    space = Space({"a": IntDistribution(0, 3)})
    known = history(4, space=Space({"a": IntDistribution(0, 3), "b": IntDistribution(0, 0)}))
    found = propose(space, History(known.points[:, :1], known.values), 4, np.random.default_rng(0))
    assert space.decode(found.points[0])["a"] in range(4)


def test_every_point_of_a_finite_space_is_proposed_once():
    known = history(2)
    for trial in range(2, SPACE.size):
        point = propose(SPACE, known, trial, np.random.default_rng(trial)).points[0]
        assert key(point) not in {key(p) for p in known.points}
        known = History(np.vstack([known.points, point]), np.append(known.values, point[0]))
        if trial > 20:
            break
    assert len({key(p) for p in known.points}) == len(known.points)


def test_values_go_through_the_transform_unless_told_otherwise():
    known = history(6)
    with mock.patch.object(proposal, "transform_values", side_effect=lambda v: v * 2) as called:
        propose(SPACE, known, 2, np.random.default_rng(0))
        assert called.call_count == 1
        propose(SPACE, known, 2, np.random.default_rng(0), transform=False)
        assert called.call_count == 1
