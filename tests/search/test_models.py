"""Acquisitions, transforms and models against independent references."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from sklearn.preprocessing import PowerTransformer

from lightning_plugins.search.models import gaussian_process
from lightning_plugins.search.models.acquisition import acquire
from lightning_plugins.search.models.forest import ForestModel
from lightning_plugins.search.models.gaussian_process import GaussianProcessModel, covariance, kumaraswamy
from lightning_plugins.search.models.power_transform import transform_values


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
    each = np.array([tree.predict(new.astype(np.float32)) for tree in model._forest.estimators_])
    mean, variance = model.predict(new)
    assert each.shape == (50, 25)
    np.testing.assert_allclose(mean, each.mean(0))
    np.testing.assert_allclose(variance, each.var(0))
    np.testing.assert_allclose(mean, model._forest.predict(new))


def test_kumaraswamy_is_the_distribution_function():
    x = np.linspace(0.01, 0.99, 30)
    for a, b in [(1.0, 1.0), (2.0, 0.5), (0.4, 3.0)]:
        density = lambda t, a=a, b=b: a * b * t ** (a - 1) * (1 - t**a) ** (b - 1)  # noqa: E731  # one line of a formula
        expected = [integrate.quad(density, 0, end)[0] for end in x]
        warped = kumaraswamy(torch.from_numpy(x)[:, None], torch.tensor([a]).double(), torch.tensor([b]).double())
        np.testing.assert_allclose(warped[:, 0], expected, rtol=1e-6, atol=1e-7)


def reference_posterior(model, new):
    """Mean and variance by inverse matrices in NumPy."""
    p = {name: value.numpy() for name, value in model._parameters._asdict().items()}

    def warp(x):
        return 1 - (1 - np.clip(x, 1e-9, 1 - 1e-9) ** np.exp(p["a"])) ** np.exp(p["b"])

    def kernel(left, right):
        x, y = warp(left), warp(right)
        r = np.sqrt(3) * np.sqrt((((x[:, None] - y[None]) / np.exp(p["lengths"])) ** 2).sum(-1) + 1e-300)
        return np.exp(p["amplitude"]) * (1 + r) * np.exp(-r) + np.exp(p["slope"]) * (x - 0.5) @ (y - 0.5).T

    known, values = model._x.numpy(), model._y.numpy()
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
    flat = torch.cat([torch.atleast_1d(value) for value in model._parameters]).double().requires_grad_()

    def objective(vector):
        return model.negative_log_posterior(gaussian_process._Parameters.unpack(vector, 2))

    assert torch.autograd.gradcheck(objective, flat, eps=1e-6, atol=1e-4)
    with torch.no_grad():
        best = objective(flat)
        for seed in range(20):
            noise = torch.randn(len(flat), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            assert objective(flat + 0.2 * noise) > best - 0.05


def test_more_observations_than_two_hundred_are_sampled():
    rng = np.random.default_rng(0)
    x = rng.random((260, 1))
    model = GaussianProcessModel(x, x[:, 0], np.random.default_rng(0))
    assert len(model._x) == 200
    assert len(np.unique(model._x.numpy())) == 200


@pytest.mark.parametrize("rows", [[[0.5], [0.5], [0.5]], [[0.0], [1.0], [1.0]]])
def test_the_gaussian_process_survives_duplicates_and_constants(rows):
    x = np.array(rows)
    for y in (np.zeros(3), np.array([0.0, 1.0, 1.0])):
        mean, variance = GaussianProcessModel(x, y, np.random.default_rng(0)).predict(x)
        assert np.isfinite(mean).all()
        assert (variance >= 0).all()


def test_covariance_of_equal_points_is_amplitude_plus_slope():
    x = torch.full((1, 2), 0.5, dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    scalars = torch.zeros(3, dtype=torch.float64)
    parameters = gaussian_process._Parameters(zero, zero, zero, *scalars)
    torch.testing.assert_close(covariance(x, x, parameters), torch.ones(1, 1, dtype=torch.float64), rtol=0, atol=1e-5)


def test_the_posterior_density_is_that_of_a_normal_distribution_with_the_priors():
    rng = np.random.default_rng(3)
    model = GaussianProcessModel(rng.random((9, 2)), rng.normal(size=9), rng)
    other = [value + 0.3 for value in model._parameters]
    densities = []
    for parameters in (model._parameters, type(model._parameters)(*other)):
        noise = parameters.noise.exp() + gaussian_process._JITTER
        matrix = covariance(model._x, model._x, parameters) + noise * torch.eye(9, dtype=torch.float64)
        normal = torch.distributions.MultivariateNormal(torch.zeros(9, dtype=torch.float64), matrix)
        densities.append(model.negative_log_posterior(parameters) + normal.log_prob(model._y) + parameters.log_prior())
    torch.testing.assert_close(densities[0], densities[1])  # the same constant


@pytest.mark.parametrize("exponent", [0.3, 1.0, 3.0])
def test_warping_has_a_derivative_at_both_ends(exponent):
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    a, b = (torch.full((1,), exponent, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gradients = torch.autograd.grad(kumaraswamy(ends, a, b).sum(), (a, b))
    assert all(gradient.isfinite().all() for gradient in gradients)


PRIORS = [(-0.7, 1.0), (0.0, 0.75), (0.0, 0.75), (0.0, 1.0), (-2.0, 1.5), (-4.63, 0.5)]  # mean and deviation


def test_the_prior_is_a_normal_distribution_of_each_logarithm():
    drawn = gaussian_process._Parameters(*torch.randn(3, 3).double(), *torch.randn(3).double())
    at_zero = gaussian_process._Parameters(*torch.zeros(3, 3).double(), *torch.zeros(3).double())
    found = [point.log_prior().item() for point in (drawn, at_zero)]
    expected = [
        sum(stats.norm(*prior).logpdf(value.numpy()).sum() for value, prior in zip(point, PRIORS, strict=True))
        for point in (drawn, at_zero)
    ]
    assert found[0] - found[1] == pytest.approx(expected[0] - expected[1])
