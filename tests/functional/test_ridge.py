import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.linear_model import Ridge

from lightning_plugins.functional import HeldOutSums, log_evidence, probe_scores, ridge_path
from lightning_plugins.functional.ridge import held_out_sums, ridge_system

LAMBDAS = [1e-3, 1.0, 1e3]


def problem(n=60, d=7, k=2, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    return x, x @ rng.normal(size=(d, k)) + rng.normal(size=(n, k))


@pytest.mark.parametrize("shape", [(60, 7), (6, 20), (1, 3)], ids=str)
def test_path_is_that_of_scikit_learn(shape):
    x, y = problem(*shape)
    weights = ridge_path(torch.tensor(x.T @ x), torch.tensor(x.T @ y), torch.tensor(LAMBDAS).double())
    for own, alpha in zip(weights, LAMBDAS, strict=True):
        expected = Ridge(alpha=alpha, fit_intercept=False, solver="svd").fit(x, y).coef_.T
        np.testing.assert_allclose(own.numpy(), expected.reshape(own.shape), rtol=1e-8, atol=1e-9)


def test_penalty_of_zero_gives_the_solution_of_least_norm():
    x, y = problem(5, 9)
    (own,) = ridge_path(torch.tensor(x.T @ x), torch.tensor(x.T @ y), torch.zeros(1).double())
    np.testing.assert_allclose(own.numpy(), np.linalg.pinv(x) @ y, rtol=1e-7, atol=1e-9)


def test_scores_from_sums_are_those_of_predictions():
    x, y = problem(40)
    z = np.concatenate([np.ones((40, 1)), x, y], axis=1)
    system = ridge_system(torch.tensor(x.T @ x), torch.tensor(x.T @ y))
    weights = system.eigenvectors @ system.coefficients(torch.tensor(LAMBDAS).double())
    scores = probe_scores(held_out_sums(weights, torch.tensor(z.T @ z)))
    for number, w in enumerate(weights.numpy()):
        p = x @ w
        variance, mse = y.var(axis=0), ((y - p) ** 2).mean(axis=0)
        np.testing.assert_allclose(scores.r2[number], 1 - mse / variance, atol=1e-11)
        np.testing.assert_allclose(scores.rmse[number], np.sqrt(mse), atol=1e-11)
        np.testing.assert_allclose(scores.v_information[number], 0.5 * np.log(variance / mse), atol=1e-10)
        expected = [np.corrcoef(p[:, k], y[:, k])[0, 1] for k in range(2)]
        np.testing.assert_allclose(scores.pearson[number], expected, atol=1e-11)


@given(seed=st.integers(0, 2**31), offset=st.floats(-1e3, 1e3))
def test_scores_do_not_change_with_the_origin(seed, offset):
    generator = torch.Generator().manual_seed(seed)
    y, p = torch.randn(2, 9, 1, dtype=torch.float64, generator=generator)
    sums = HeldOutSums(torch.tensor(9), *(v.sum(0) for v in (y, y * y, p, p * p, y * p)))
    torch.testing.assert_close(
        probe_scores(sums.moved(torch.tensor([offset]).double())), probe_scores(sums), atol=1e-6, rtol=1e-6
    )
    assert -1 <= probe_scores(sums).pearson <= 1
    assert probe_scores(sums).r2 <= 1


def test_constant_target_and_prediction_have_no_score():
    y, p = torch.ones(4, 1).double(), torch.zeros(4, 1).double()
    scores = probe_scores(HeldOutSums(torch.tensor(4), *(v.sum(0) for v in (y, y * y, p, p * p, y * p))))
    assert scores.r2.isnan()
    assert scores.pearson.isnan()
    assert scores.rmse == 1


@pytest.mark.parametrize(
    ("gram", "cross", "lambdas", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 1), torch.ones(1), r"`gram` must have shape \(d, d\)"),
        (torch.ones(2, 2), torch.ones(3, 1), torch.ones(1), r"`cross` must have shape \(2, k\)"),
        (torch.ones(2, 2), torch.ones(2, 1), -torch.ones(1), "`lambdas` must be finite and at least 0"),
        (torch.ones(2, 2), torch.ones(2, 1), torch.ones(0), r"`lambdas` must have shape \(L,\)"),
    ],
    ids=["gram", "cross", "negative", "none"],
)
def test_refusals(gram, cross, lambdas, message):
    with pytest.raises(ValueError, match=message):
        ridge_path(gram, cross, lambdas)


def fixed_point(x, y, rounds=20_000):
    """LogME's iteration in both precisions, by another decomposition than ours."""
    n = len(x)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    b, rest = u.T @ y, y @ y - ((u.T @ y) ** 2).sum()
    a, p = 1.0, 1.0
    for _ in range(rounds):
        gamma = (p * s**2 / (a + p * s**2)).sum()
        m2 = ((p * s * b / (a + p * s**2)) ** 2).sum()
        error = rest + ((a * b / (a + p * s**2)) ** 2).sum()
        a, p = gamma / m2, (n - gamma) / error
    return a, p


@pytest.mark.parametrize("shape", [(50, 6), (12, 30)], ids=str)
def test_evidence_is_the_density_at_the_fixed_point(shape):
    x, y = problem(*shape, k=1, seed=3)
    system = ridge_system(torch.tensor(x.T @ x), torch.tensor(x.T @ y))
    found = log_evidence(system.eigenvalues, system.projections, torch.tensor((y * y).sum(0)), len(x))
    a, p = fixed_point(x, y[:, 0])
    covariance = np.eye(len(x)) / p + x @ x.T / a
    expected = stats.multivariate_normal(np.zeros(len(x)), covariance).logpdf(y[:, 0])
    np.testing.assert_allclose(found.log_evidence.item(), expected, rtol=1e-8)
    np.testing.assert_allclose([found.ratio.item(), found.noise_precision.item()], [a / p, p], rtol=1e-3)


def test_evidence_of_features_that_say_nothing_is_that_of_noise():
    y = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]).double()
    found = log_evidence(torch.ones(2).double(), torch.zeros(2, 1).double(), (y * y).sum(0), 4)
    expected = stats.norm(0, 1).logpdf(y.numpy()).sum()
    np.testing.assert_allclose(found.log_evidence.item(), expected, rtol=1e-6)
