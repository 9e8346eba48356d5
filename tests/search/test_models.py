"""Acquisitions, transforms and models against independent references."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from sklearn.ensemble import RandomForestRegressor
from sklearn.preprocessing import PowerTransformer

from lightning_plugins.search.models import gaussian_process
from lightning_plugins.search.models.acquisition import acquire
from lightning_plugins.search.models.forest import ForestModel
from lightning_plugins.search.models.gaussian_process import (
    GaussianProcessModel,
    Parameters,
    covariance,
    kumaraswamy,
)
from lightning_plugins.search.models.power_transform import transform_values

PRIORS = [(-0.7, 1.0), (0.0, 0.75), (0.0, 0.75), (0.0, 1.0), (-2.0, 1.5), (-4.63, 0.5)]  # mean and deviation


@pytest.mark.parametrize(
    ("mean", "variance", "best"), [(0.3, 0.04, 0.2), (-1.0, 4.0, 0.5), (5.0, 1e-6, 0.0), (0.0, 0.0, 0.0)]
)
def test_acquisitions_are_the_integrals_they_stand_for(mean, variance, best):
    deviation = np.sqrt(variance) + 1e-4
    density = stats.norm(mean, deviation).pdf
    low = mean - 12 * deviation
    improvement, _ = (
        integrate.quad(lambda y: (best - y) * density(y), low, best, points=[mean], limit=200) if best > low else (0, 0)
    )
    probability = stats.norm(mean, deviation).cdf(best)
    arrays = np.array([mean]), np.array([variance]), best
    np.testing.assert_allclose(acquire("ei", *arrays), improvement, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(np.exp(acquire("pi", *arrays)), probability, rtol=1e-9)
    np.testing.assert_allclose(acquire("ucb", *arrays), deviation - mean)


def test_probability_of_improvement_keeps_the_order_where_it_underflows():
    scores = acquire("pi", np.array([60.0, 50.0, 70.0]), np.ones(3), 0.0)
    assert list(np.argsort(-scores)) == [1, 0, 2]


@given(st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=40, unique=True), st.booleans())
def test_transforms_keep_the_order(values, shifted):
    array = np.array(values) - (500 if shifted else 0)
    result = transform_values(array)
    assert np.isfinite(result).all()
    order = np.argsort(array)
    assert (np.diff(result[order]) >= -1e-9).all()


@pytest.mark.parametrize("shift", [0.0, -3.0])
def test_transforms_are_those_of_scikit_learn(shift):
    values = np.random.default_rng(0).gamma(2.0, 1.0, 60) + 0.1 + shift
    scaled = values / values.std()
    method = "box-cox" if shift == 0 else "yeo-johnson"
    reference = PowerTransformer(method, standardize=False).fit_transform(scaled[:, None])[:, 0]
    assert reference.std() > 0.5
    np.testing.assert_allclose(transform_values(values), reference, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("values", [[0.586, 0.5791, 0.586], [0.4992, 0.5137, 0.5137], [2.8359, 2.8118, 2.8359]])
def test_values_whose_exponent_has_no_bounds_are_left(values):
    array = np.array(values)  # two that are close and a running trial, which counts with the worst
    np.testing.assert_array_equal(transform_values(array), array)


def test_values_that_a_transform_squeezes_together_are_transformed_again_or_left():
    values = np.exp(np.random.default_rng(0).normal(0, 0.02, 50)) * 100  # almost equal: Box-Cox leaves nothing
    result = transform_values(values)
    assert result.std() >= 0.5 or result is values


@pytest.mark.parametrize("values", [[2.0, 2.0, 2.0], [1.0], [np.inf, 1.0]])
def test_degenerate_values_come_back(values):
    np.testing.assert_array_equal(transform_values(np.array(values)), values)


def test_the_forest_predicts_as_its_trees_do():
    rng = np.random.default_rng(0)
    x, y, new = rng.random((40, 3)), rng.random(40), rng.random((25, 3))
    model = ForestModel(x, y, np.random.default_rng(1))
    each = np.array([tree.predict(new) for tree in model._trees])
    mean, variance = model.predict(new)
    assert each.shape == (50, 25)
    np.testing.assert_allclose(mean, each.mean(0))
    np.testing.assert_allclose(variance, each.var(0))


def test_the_forest_is_as_good_as_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    x, new = rng.random((80, 3)), rng.random((500, 3))

    def truth(points):
        return np.sin(5 * points[:, 0]) + points[:, 1] ** 2

    library = RandomForestRegressor(50, max_features=1.0, random_state=0).fit(x, truth(x))
    mean, variance = ForestModel(x, truth(x), rng).predict(new)
    each = np.array([tree.predict(new) for tree in library.estimators_])
    errors = [np.square(guess - truth(new)).mean() for guess in (mean, library.predict(new))]
    assert errors[0] == pytest.approx(errors[1], rel=0.2)
    assert variance.mean() == pytest.approx(each.var(0).mean(), rel=0.2)


def test_kumaraswamy_is_the_distribution_function():
    x = np.linspace(0.01, 0.99, 30)
    for a, b in [(1.0, 1.0), (2.0, 0.5), (0.4, 3.0)]:
        density = lambda t, a=a, b=b: a * b * t ** (a - 1) * (1 - t**a) ** (b - 1)  # noqa: E731  # one line of a formula
        expected = [integrate.quad(density, 0, end)[0] for end in x]
        warped = kumaraswamy(x[:, None], np.array([a]), np.array([b]))
        np.testing.assert_allclose(warped[:, 0], expected, rtol=1e-6, atol=1e-7)


def reference_posterior(model, new):
    """Mean and variance by inverse matrices in NumPy."""
    p = model.parameters._asdict()

    def warp(x):
        return 1 - (1 - np.clip(x, 1e-9, 1 - 1e-9) ** np.exp(p["a"])) ** np.exp(p["b"])

    def kernel(left, right):
        x, y = warp(left), warp(right)
        r = np.sqrt(3) * np.sqrt((((x[:, None] - y[None]) / np.exp(p["lengths"])) ** 2).sum(-1) + 1e-300)
        return np.exp(p["amplitude"]) * (1 + r) * np.exp(-r) + np.exp(p["slope"]) * (x - 0.5) @ (y - 0.5).T

    known, values = model._x, model._y
    inverse = np.linalg.inv(kernel(known, known) + (np.exp(p["noise"]) + 1e-8) * np.eye(len(known)))
    cross = kernel(new, known)
    mean = cross @ inverse @ values
    variance = np.diag(kernel(new, new)) - np.einsum("ij,jk,ik->i", cross, inverse, cross)
    return mean * model._scale + model._center, variance * model._scale**2


def test_the_gaussian_process_is_the_posterior_of_its_kernel():
    rng = np.random.default_rng(0)
    x = rng.random((30, 3))
    y = np.sin(5 * x[:, 0]) + x[:, 1] ** 3 + 0.05 * rng.normal(size=30)
    model = GaussianProcessModel(x, y, rng)
    new = rng.random((12, 3))
    mean, variance = model.predict(new)
    expected_mean, expected_variance = reference_posterior(model, new)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, expected_variance, rtol=1e-4, atol=1e-6)
    truth = np.sin(5 * new[:, 0]) + new[:, 1] ** 3
    assert np.abs(mean - truth).mean() < 0.15


def test_hyper_parameters_are_a_mode_of_their_posterior():
    rng = np.random.default_rng(0)
    x = rng.random((25, 2))
    y = np.sin(6 * x[:, 0]) + 0.1 * rng.normal(size=25)
    model = GaussianProcessModel(x, y, rng)
    flat = model.parameters.pack()
    best, slope = model.negative_log_posterior(flat)
    assert np.abs(slope).max() < 0.05
    for _ in range(20):
        assert model.negative_log_posterior(flat + 0.2 * rng.normal(size=len(flat)))[0] > best - 0.05


@given(st.integers(0, 10_000), st.integers(1, 4), st.booleans())
def test_the_gradient_of_the_posterior_is_that_of_finite_differences(seed, dimensions, edges):
    rng = np.random.default_rng(seed)
    x = rng.random((12, dimensions))
    if edges:  # categories are 0 and 1, and points come twice
        x = x.round()
    model = GaussianProcessModel(x, rng.normal(size=12), rng)
    flat = rng.normal(size=3 * dimensions + 3) * 0.5
    _, gradient = model.negative_log_posterior(flat)
    for index, value in enumerate(gradient):
        step = np.eye(len(flat))[index] * 1e-5
        high, low = (model.negative_log_posterior(flat + sign * step)[0] for sign in (1, -1))
        assert value == pytest.approx((high - low) / 2e-5, rel=1e-4, abs=1e-4)


def test_more_observations_than_two_hundred_are_sampled():
    rng = np.random.default_rng(0)
    x = rng.random((260, 1))
    model = GaussianProcessModel(x, x[:, 0], np.random.default_rng(0))
    assert len(model._x) == 200
    assert len(np.unique(model._x)) == 200


@pytest.mark.parametrize("rows", [[[0.5], [0.5], [0.5]], [[0.0], [1.0], [1.0]]])
def test_the_gaussian_process_survives_duplicates_and_constants(rows):
    x = np.array(rows)
    for y in (np.zeros(3), np.array([0.0, 1.0, 1.0])):
        mean, variance = GaussianProcessModel(x, y, np.random.default_rng(0)).predict(x)
        assert np.isfinite(mean).all()
        assert (variance >= 0).all()


def test_covariance_of_equal_points_is_amplitude_plus_slope():
    x = np.full((1, 2), 0.5)
    np.testing.assert_allclose(covariance(x, x, Parameters.unpack(np.zeros(9))), np.ones((1, 1)), atol=1e-7)


def test_the_posterior_density_is_that_of_a_normal_distribution_with_the_priors():
    rng = np.random.default_rng(3)
    model = GaussianProcessModel(rng.random((9, 2)), rng.normal(size=9), rng)
    constants = []
    for flat in (model.parameters.pack(), model.parameters.pack() + 0.3):
        parameters = Parameters.unpack(flat)
        warped = kumaraswamy(model._x, np.exp(parameters.a), np.exp(parameters.b))
        noise = np.exp(parameters.noise) + gaussian_process._JITTER
        normal = stats.multivariate_normal(np.zeros(9), covariance(warped, warped, parameters) + noise * np.eye(9))
        prior = sum(stats.norm(*prior).logpdf(value).sum() for value, prior in zip(parameters, PRIORS, strict=True))
        constants.append(model.negative_log_posterior(flat)[0] + normal.logpdf(model._y) + prior)
    assert constants[0] == pytest.approx(constants[1])  # the constant that the density leaves out
