"""Faithfulness, infidelity, sensitivity and random parameters against NumPy and Captum."""

import math

import numpy as np
import pytest
import torch
from captum.metrics import infidelity as captum_infidelity
from captum.metrics import sensitivity_max
from scipy.stats import spearmanr

from lightning_plugins.functional.attribution import (
    NoiseDraws,
    faithfulness_correlation,
    infidelity,
    parameter_randomization,
    random_attributions,
    sensitivity,
)
from lightning_plugins.functional.attribution._ordering import spearman
from lightning_plugins.functional.attribution.infidelity import noise_of
from lightning_plugins.functional.attribution.random import random_bits, random_uniform, sample_keys, split_keys
from tests.functional.test_attribution_curves import LENGTH, batch, network


def test_faithfulness_correlation_equals_numpy():
    (x, maps, target), model = batch(), network()
    found = faithfulness_correlation(model, x, maps, target, draws=15, share=0.2, max_forward_batch=11)
    keys = sample_keys(x)
    for row in range(5):
        sums, drops = [], []
        with torch.no_grad():
            whole = model(x[row : row + 1])[0, target[row]].item()
            for draw in range(1, 16):
                chosen = random_bits(split_keys(keys[row : row + 1], draw), LENGTH, seed=0)[0].topk(4).indices
                copy = x[row].clone()
                copy[:, chosen] = 0
                sums.append(maps[row, 0, chosen].sum().item())
                drops.append(whole - model(copy[None])[0, target[row]].item())
        assert found[row].item() == pytest.approx(np.corrcoef(sums, drops)[0, 1], abs=1e-8)


def test_faithfulness_of_a_linear_model_is_perfect_and_of_constants_undefined():
    x = torch.randn(3, 1, LENGTH)
    weight = torch.randn(LENGTH)

    def forward(inputs):
        return torch.stack([inputs[:, 0] @ weight, -(inputs[:, 0] @ weight)], 1)

    target = torch.zeros(3).long()
    torch.testing.assert_close(
        faithfulness_correlation(forward, x, x * weight, target), torch.ones(3), rtol=0, atol=1e-4
    )
    assert faithfulness_correlation(forward, x, torch.zeros_like(x), target).isnan().all()


@pytest.mark.parametrize("normalize", [False, True])
def test_infidelity_equals_captum(normalize):
    (x, maps, target), model = batch(), network()
    found = infidelity(
        model, x, maps, target, draws=NoiseDraws(count=8, std=0.2), normalize=normalize, max_forward_batch=9
    )
    keys = sample_keys(x)

    def noise(inputs):  # Captum repeats each sample for all its draws
        samples = torch.arange(len(x)).repeat_interleave(8)
        made = noise_of(x, keys, samples, torch.arange(1, 9).repeat(len(x)), 0.2, 0).to(inputs)
        return made, inputs - made

    wanted = captum_infidelity(model, noise, x, maps, target=target, n_perturb_samples=8, normalize=normalize)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)


def test_sensitivity_equals_captum():
    (x, _, target), model = batch(), network()

    @torch.enable_grad()  # Captum explains without
    def explain(inputs, target):
        inputs = (inputs[0] if isinstance(inputs, tuple) else inputs).detach().requires_grad_()
        picked = model(inputs).gather(1, target[:, None]).sum()
        return torch.autograd.grad(picked, inputs)[0] * inputs.detach()

    found = sensitivity(explain, x, target, draws=6, radius=0.05, max_forward_batch=4)
    keys = sample_keys(x)

    def moved(inputs):
        inputs = inputs[0] if isinstance(inputs, tuple) else inputs
        samples, draws = torch.arange(len(x)).repeat_interleave(6), torch.arange(1, 7).repeat(len(x))
        noise = 2 * random_uniform(split_keys(keys[samples], draws), LENGTH, seed=0) - 1
        return inputs + 0.05 * noise.reshape(inputs.shape).to(inputs)

    wanted = sensitivity_max(
        lambda inputs, target: (explain(inputs, target),), x, moved, n_perturb_samples=6, target=target
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)


def test_random_numbers_belong_to_samples():
    x = torch.randn(4, 2, 9)
    maps = random_attributions(x)
    torch.testing.assert_close(random_attributions(x[[2, 0]]), maps[[2, 0]], rtol=0, atol=0)
    assert maps.shape == (4, 9)
    assert not torch.equal(maps, random_attributions(x, seed=1))
    uniform = random_uniform(torch.arange(500), 40, seed=4)
    assert 0 < uniform.min() < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.01
    assert abs(uniform.var() - 1 / 12) < 0.003
    assert abs(torch.corrcoef(uniform[:, :2].T)[0, 1]) < 0.15


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_equals_scipy(ties):
    a, b = torch.randn(2, 4, 30, dtype=torch.float64)
    if ties:
        a, b = a.clamp_min(0), (2 * b).round()
    wanted = [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(spearman(a, b), torch.tensor(wanted, dtype=torch.float64))
    a[0], b[1, 3] = 1.0, math.nan
    assert spearman(a, b).isnan().tolist() == [True, True, False, False]


def test_randomized_parameters_are_put_back():
    model = network()
    x, _, target = batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def explain(inputs, target):
        inputs = inputs.detach().requires_grad_()
        return torch.autograd.grad(model(inputs).gather(1, target[:, None]).sum(), inputs)[0]

    found = parameter_randomization(model, explain, x, target)
    assert list(found) == ["3", "1"]
    assert found["1"].abs().max() < 0.9
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    alone = parameter_randomization(model, explain, x, target, order="independent")
    torch.testing.assert_close(alone["3"], found["3"])  # the last layer goes first, in both orders
    assert (alone["1"] - found["1"]).abs().max() > 0.01
    absolute = parameter_randomization(model, explain, x, target, absolute=True)
    assert (absolute["1"] - found["1"]).abs().max() > 0.01
    with pytest.raises(KeyError):
        parameter_randomization(model, lambda a, b: {}[len(before)], x, target)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
