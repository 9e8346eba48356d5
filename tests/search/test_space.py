"""Points of a search space, its candidates and mutations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lightning_plugins.search.space import Space, key

MIXED = {
    "lr": FloatDistribution(1e-5, 1e-1, log=True),
    "dropout": FloatDistribution(0.0, 0.6, step=0.3),
    "width": IntDistribution(16, 512, log=True),
    "depth": IntDistribution(2, 10, step=4),
    "act": CategoricalDistribution(("relu", None, 3.0)),
}
FINITE = {name: MIXED[name] for name in ("dropout", "depth", "act")}


def points(space, seed):
    return space._sobol(np.random.default_rng(seed))


def distributions():
    number = st.integers(-50, 50)
    ints = st.builds(
        lambda low, span, step: IntDistribution(low, low + span, step=step),
        number,
        st.integers(0, 60),
        st.integers(1, 7),
    )
    logs = st.builds(
        lambda low, span: IntDistribution(low, low + span, log=True), st.integers(1, 30), st.integers(0, 90)
    )
    floats = st.builds(lambda low, span: FloatDistribution(low, low + span), number, st.integers(0, 9))
    stepped = st.builds(lambda low, n: FloatDistribution(low, low + n * 0.25, step=0.25), number, st.integers(0, 9))
    choices = st.integers(1, 6).map(lambda n: CategoricalDistribution(list(range(n))))
    return st.dictionaries(
        st.text("abcdef", min_size=1, max_size=3), ints | logs | floats | stepped | choices, min_size=1, max_size=5
    )


@given(distributions(), st.integers(0, 2**20))
def test_decoded_values_lie_in_their_distributions_and_encode_to_the_same_point(distributions, seed):
    space = Space(distributions, max_candidates=64)
    rng = np.random.default_rng(seed)
    for point in [space.random(rng), *space.candidates(rng)[:5], space.mutate(space.random(rng), rng)]:
        values = space.decode(point)
        for name, value in values.items():
            assert distributions[name]._contains(distributions[name].to_internal_repr(value)), (name, value)
        again = space.encode(values)
        assert space.decode(again) == values
        assert ((space.features(point[None]) >= 0) & (space.features(point[None]) <= 1)).all()


def test_coordinates_follow_the_scale_of_a_distribution():
    space = Space(MIXED)
    values = {"lr": 1e-3, "dropout": 0.3, "width": 16, "depth": 10, "act": None}
    np.testing.assert_allclose(space.encode(values), [0.5, 0.5, 0, 1, 1])
    np.testing.assert_allclose(space.features(space.encode(values)[None])[0], [0.5, 0.5, 0, 1, 0, 1, 0])
    assert isinstance(space.decode(space.encode(values))["width"], int)


def test_a_small_finite_space_is_its_own_candidates():
    space = Space(FINITE)
    every = space.candidates(np.random.default_rng(0))
    assert space.size == len(every) == 27
    assert len({key(point) for point in every}) == 27
    rest = space.candidates(np.random.default_rng(0), every[:20])
    assert {key(p) for p in rest} == {key(p) for p in every[20:]}
    assert space.candidates(np.random.default_rng(0), every).shape == (0, 3)


def test_a_large_space_gives_points_of_a_sobol_sequence_each_once():
    space = Space(MIXED, max_candidates=300)
    assert space.size is None
    found = space.candidates(np.random.default_rng(0))
    assert len(found) == len({key(p) for p in found}) == 300
    lr = np.sort(found[:, 0])
    assert np.abs(lr - (np.arange(300) + 0.5) / 300).max() < 0.02  # far more even than 300 random numbers
    counts = [(found[:, 4] == choice).mean() for choice in range(3)]
    assert max(counts) - min(counts) < 0.05


def test_a_finite_space_beyond_the_limit_is_sampled():
    space = Space(FINITE, max_candidates=10)
    found = space.candidates(np.random.default_rng(0))
    assert space.size == 27
    assert 3 < len(found) <= 10
    assert {key(p) for p in found} <= {key(p) for p in Space(FINITE).candidates(np.random.default_rng(0))}


def test_mutation_changes_one_coordinate():
    space = Space(MIXED)
    rng = np.random.default_rng(0)
    changed = set()
    for _ in range(300):
        point = space.random(rng)
        child = space.mutate(point, rng)
        (where,) = np.flatnonzero(child != point)
        changed.add(int(where))
    assert changed == set(range(5))


def test_mutation_of_a_number_is_a_clipped_normal_step():
    space = Space({"x": FloatDistribution(0, 1)})
    rng = np.random.default_rng(0)
    drawn = np.array([space.mutate(np.array([0.3]), rng)[0] for _ in range(20000)])
    from scipy.stats import norm

    assert abs((drawn == 0).mean() - norm.cdf(-0.3 / 0.5)) < 0.01
    assert abs((drawn == 1).mean() - norm.sf(0.7 / 0.5)) < 0.01
    inside = drawn[(drawn > 0) & (drawn < 1)]
    expected = (norm.cdf(0.4) - norm.cdf(-0.6)) and (norm.cdf((0.5 - 0.3) / 0.5) - norm.cdf(-0.6))
    assert abs((inside < 0.5).sum() / len(drawn) - expected) < 0.01


def test_mutation_of_a_category_is_uniform_over_the_others():
    space = Space({"act": CategoricalDistribution(list(range(5)))})
    rng = np.random.default_rng(0)
    drawn = np.array([space.mutate(np.array([2.0]), rng)[0] for _ in range(8000)])
    shares = [(drawn == choice).mean() for choice in range(5)]
    np.testing.assert_allclose(shares, [0.25, 0.25, 0, 0.25, 0.25], atol=0.02)


def test_a_space_of_one_point_has_nothing_to_mutate():
    space = Space({"x": IntDistribution(3, 3)})
    point = space.random(np.random.default_rng(0))
    assert space.decode(space.mutate(point, np.random.default_rng(0))) == {"x": 3}


def test_random_points_avoid_known_ones_while_there_are_others():
    space = Space(FINITE)
    rng = np.random.default_rng(0)
    known = []
    for _ in range(27):
        point = space.random(rng, known)
        assert key(point) not in {key(p) for p in known}
        known.append(point)
    assert key(space.random(rng, known)) in {key(p) for p in known}


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [(({},), ValueError, "at least one parameter"), (({"x": object()},), TypeError, r"`distributions\['x'\]` must be")],
)
def test_refusals(arguments, error, match):
    with pytest.raises(error, match=match):
        Space(*arguments)


@pytest.mark.parametrize(("value", "coordinate"), [(0.0, 0.0), (1e-4, 0.0), (1e-3, 0.5), (1e-2, 1.0), (7.0, 1.0)])
def test_values_outside_of_their_range_are_at_its_ends(value, coordinate):
    space = Space({"lr": FloatDistribution(1e-4, 1e-2, log=True)})
    assert space.encode({"lr": value}) == pytest.approx([coordinate])
