import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from lightning_plugins.information import CriticSettings, critics, fit_critic, fitting
from lightning_plugins.information.critics import CRITICS, GaussianRatio, Start, make_critic
from lightning_plugins.information.fitting import OBJECTIVES
from lightning_plugins.information.marginals import Marginals

QUICK = CriticSettings(max_steps=20, check_every=10, batch_size=64, width=16)


def correlated(n, d=2, rho=0.8, seed=0):
    x, noise = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed)).unbind()
    return x, rho * x + math.sqrt(1 - rho**2) * noise


def test_start_is_the_density_ratio_of_gaussians():
    mix = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = torch.randn(400, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) @ mix
    z = z - z.mean(0)
    x, y, s = z[:, :2], z[:, 2:], z.T.cov()
    ratio = GaussianRatio(x, y, 0.0)
    one, other = ratio.encode(x[:6], y[:4])
    densities = [MultivariateNormal(torch.zeros(len(part), dtype=s.dtype), part) for part in (s, s[:2, :2], s[2:, 2:])]
    for i in range(6):
        for j in range(4):
            joint = densities[0].log_prob(torch.cat([x[i], y[j]]))
            expected = joint - densities[1].log_prob(x[i]) - densities[2].log_prob(y[j])
            torch.testing.assert_close(one[i] @ other[j], expected)


def test_normal_scores_undo_increasing_changes():
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    scores = Marginals(x, "normal")(x)
    torch.testing.assert_close(Marginals(x.exp(), "normal")(x.exp()), scores)
    assert float((scores - x).abs().median()) < 0.1
    tied = torch.tensor([[0.0], [0.0], [0.0], [1.0]])
    assert Marginals(tied, "normal")(tied).isfinite().all()
    outside = Marginals(x, "normal")(torch.tensor([[-1e9, 1e9]]))
    assert outside.isfinite().all()
    assert bool((outside.abs() >= scores.abs().max() - 1e-3).all())
    assert not Marginals(torch.ones(9, 1), "standard")(torch.ones(2, 1)).any()


@pytest.mark.parametrize("name", CRITICS)
def test_scores_are_the_same_row_by_row_and_in_blocks(name, monkeypatch):
    x, y = correlated(60)
    critic = make_critic(name, x, y, Start("standard", 0.03), 8)
    for parameter in critic.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    scores = critic(x[:9], y[:7])
    assert scores.shape == (9, 7)
    monkeypatch.setattr(critics, "_JOINT_ELEMENTS", 1)
    torch.testing.assert_close(torch.stack([critic(x[i : i + 1], y[:7])[0] for i in range(9)]), scores)


@pytest.mark.parametrize(
    ("name", "objective"),
    [*(("separable", objective) for objective in OBJECTIVES), ("joint", "infonce"), ("joint", "nwj")],
)
def test_every_objective_trains_every_network(name, objective):
    """From a start without a Gaussian the training itself must find what y = x**2 says."""
    x, _ = correlated(600, 1)
    fitted = fit_critic(
        x, x.square(), name,
        settings=CriticSettings(objective, batch_size=64, max_steps=150, lr=3e-3, check_every=25, width=24),
    )  # fmt: skip
    assert fitted.validation > fitted.history[0] + 0.1
    assert fitted.validation == max(fitted.history.values())
    assert fitted.history[fitted.steps] == fitted.validation


def test_fit_depends_on_neither_the_order_nor_the_random_state_nor_inference_mode():
    x, y = correlated(200)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    before = torch.random.get_rng_state()
    first = fit_critic(x, y, settings=QUICK)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(7)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        second = fit_critic(x[order], y[order], settings=QUICK)
    for name, value in first.critic.state_dict().items():
        torch.testing.assert_close(second.critic.state_dict()[name], value, rtol=0, atol=0)
    assert torch.equal(x[first.test_rows], x[order][second.test_rows])


def test_equal_pairs_fall_on_one_side():
    x, y = correlated(100)
    fitted = fit_critic(x.repeat(2, 1), y.repeat(2, 1), settings=CriticSettings(max_steps=0, test=0.5))
    counts = torch.bincount(fitted.test_rows % 100, minlength=100)
    assert int((counts == 1).sum()) <= 1  # at the border


def test_the_fewest_pairs_are_fitted():
    fitted = fit_critic(*correlated(8), settings=CriticSettings(max_steps=0, test=0.0))
    assert math.isfinite(fitted.validation)


def test_seed_gives_another_split():
    x, y = correlated(100)
    splits = [set(fit_critic(x, y, settings=CriticSettings(max_steps=0, seed=s)).test_rows.tolist()) for s in (0, 1)]
    assert splits[0] != splits[1]


BAD = {
    "objective": ({"objective": "infonec"}, ValueError, "did you mean 'infonce'"),
    "batch of one": ({"batch_size": 1}, ValueError, "`batch_size` must be at least 2"),
    "steps": ({"max_steps": -1}, ValueError, "`max_steps` must be at least 0"),
    "lr": ({"lr": 0.0}, ValueError, "`lr` must be positive"),
    "nothing to train": ({"validation": 0.5, "test": 0.5}, ValueError, "validation . test < 1"),
    "no validation": ({"validation": 0.0}, ValueError, "`validation` must be positive"),
    "percent": ({"test": 35}, ValueError, "`test` must be .* did you mean 0.35"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_named(case):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        CriticSettings(**arguments)


@pytest.mark.parametrize(
    ("x", "y", "critic", "error", "message"),
    [
        (torch.ones(20, 2), torch.ones(20, 2), "separabel", ValueError, "`critic` must be .* did you mean 'separable'"),
        (torch.ones(20, 2), torch.randn(20, 3), "cosine", ValueError, "`critic='cosine'` needs as many features"),
        (torch.ones(7, 2), torch.ones(7, 2), "separable", ValueError, "`x` must have at least 8 pairs, got 7"),
        (torch.ones(20, 2).int(), torch.ones(20, 2), "separable", TypeError, "`x` must be .* tensor, got torch.int32;"),
        (torch.ones(20, 2), torch.full((20, 2), math.inf), "separable", ValueError, "`y` must be finite.* in 20 rows"),
    ],
)
def test_bad_pairs_are_named(x, y, critic, error, message):
    with pytest.raises(error, match=message):
        fit_critic(x, y, critic)


def test_a_wrong_critic_is_refused_before_anything_is_fitted(monkeypatch):
    made = []
    monkeypatch.setattr(fitting, "make_critic", lambda *arguments: made.append(arguments) or make_critic(*arguments))
    settings = CriticSettings(max_steps=0)
    with pytest.raises(ValueError, match="did you mean 'joint'"):
        fit_critic(*correlated(20), "jiont", settings=settings)
    assert not made
    fit_critic(*correlated(20), "joint", settings=settings)
    assert made
