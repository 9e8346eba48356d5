"""Decompositions that follow those of a step before, as on an accelerator: against exact ones, and without waits."""

import copy
import itertools

import pytest
import torch
from torch import nn

from lightning_plugins.compression import apply_masks, apply_thresholds, channel_groups
from lightning_plugins.compression.budget.budgeted_network import BudgetedNetwork
from lightning_plugins.compression.budget.choice import Choice
from lightning_plugins.compression.budget.filling import ChoiceRates, ChoiceSettings
from lightning_plugins.compression.gates import followed_bases, thresholded
from lightning_plugins.functional import singular_value_threshold
from tests._waits import Waits


@pytest.fixture(autouse=True)
def following(monkeypatch):
    monkeypatch.setattr(followed_bases, "follows", lambda weight: True)


def perceptron(dtype=torch.float64, seed=0, **settings):
    """Two layers of one shape, whose masks are deferred, and a tall one with masks before the threshold."""
    torch.manual_seed(seed)
    sizes = (48, 24, 24, 48, 5)
    layers = [part for one, two in itertools.pairwise(sizes) for part in (nn.Linear(one, two), nn.ReLU())]
    net = nn.Sequential(*layers[:-1]).to(dtype)
    x = torch.randn(64, 48, dtype=dtype)
    masks = apply_masks(net, channel_groups(net, x), beta=10.0, init=0.25)
    return net, masks, apply_thresholds(net, beta=10.0, **{"init": 0.2, **settings}), x


def masked_weights(net, masks):
    """The weights that thresholds act on, by the numbers of their layers."""
    found = {}
    for index, place in enumerate((0, 2, 4, 6)):
        weight = net[place].parametrizations.weight.original
        found[place] = weight * masks.mask(index)[:, None] if index < len(masks.scores) else weight
    return found


def compare(net, masks, thresholds, tolerance, gradients=True):
    """Weights, their gradients and ranks against those of decompositions of the weights as they are."""
    masked = masked_weights(net, masks)
    for index, place in enumerate(masked):
        original, value = net[place].parametrizations.weight.original, thresholds.values[index]
        torch.manual_seed(index)
        upstream = torch.randn_like(original)
        inputs = [original, value, *masks.scores[index : index + 1]]
        lowered = net[place].weight
        got = torch.autograd.grad((lowered * upstream).sum(), inputs)
        expected = singular_value_threshold(masked[place], thresholds.tau(index))
        wanted = torch.autograd.grad((expected * upstream).sum(), inputs)
        scale = expected.detach().norm()
        assert torch.dist(lowered, expected) < tolerance * scale, place
        for one, other in zip(got, wanted, strict=True) if gradients else ():
            assert torch.dist(one, other) < 3 * tolerance * (other.norm() + 0.1 * upstream.norm()), place
        values = torch.linalg.svdvals(masked[place].detach())
        soft = torch.sigmoid(thresholds.beta * (values - thresholds.tau(index).detach()) / values[0]).sum()
        assert float(thresholds.soft_ranks()[thresholds.layers[index]].detach()) == pytest.approx(float(soft), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("every", [1, 4])
def test_following_is_exact_while_masks_close(every, dtype):
    net, masks, thresholds, x = perceptron(dtype, refresh_every=every)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    target = torch.randn(64, 5, dtype=dtype)
    for step in range(50):
        optimizer.zero_grad()
        (net(x) - target).square().mean().backward()
        if step % every == 0:
            # Held matrices have the exact gradient on average only: `test_thresholds.py`.
            compare(net, masks, thresholds, 1e-2 if every == 1 else 2e-2, gradients=every == 1)
        for scores in masks.scores:
            scores.grad = None
        optimizer.step()
        thresholds.clamp_()
        with torch.no_grad():  # the first half of every group closes, a tenth of a logit in a step
            for scores in masks.scores:
                scores[: len(scores) // 2] -= 0.01
    assert masks.mask(0)[0] < 0.1 < 0.9 < masks.mask(0)[-1]
    exact = {}
    for index, weight in enumerate(masked_weights(net, masks).values()):
        above = torch.linalg.svdvals(weight.detach().double()) > thresholds.tau(index).detach()
        exact[thresholds.layers[index]] = max(1, int(above.sum()))
    assert thresholds.hard_ranks() == exact


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_basis_that_is_lost_is_found_again_in_a_few_steps(dtype):
    net, masks, thresholds, x = perceptron(dtype)
    net(x)
    torch.manual_seed(1)
    with torch.no_grad():
        for place in (0, 2, 4, 6):
            net[place].parametrizations.weight.original.normal_(std=0.1)
        masks.scores[0].uniform_(-0.3, 0.3)
    for _ in range(25):
        assert net(x).isfinite().all()
        net(x).sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
        with torch.no_grad():
            net[0].parametrizations.weight.original.add_(0)  # a step that moves nothing
            for place in (2, 4, 6):
                net[place].parametrizations.weight.original.mul_(1)
    compare(net, masks, thresholds, 1e-2)


def test_weights_that_are_not_finite_for_a_step_spoil_no_basis():
    net, masks, thresholds, x = perceptron()
    net(x)
    original = net[2].parametrizations.weight.original
    before = original.detach().clone()
    with torch.no_grad():
        original[0, 0] = torch.nan
    assert net[2].weight.isnan().all()
    assert net[0].weight.isfinite().all()
    with torch.no_grad():
        original.copy_(before)
    for _ in range(10):
        assert net[2].weight.isfinite().all()
        with torch.no_grad():
            original.mul_(1)
    compare(net, masks, thresholds, 1e-3)


def test_ranks_and_what_is_delivered_come_from_exact_decompositions(monkeypatch):
    net, _, thresholds, x = perceptron()
    net(x)
    calls = []
    decompose = thresholded.decompose_wide
    monkeypatch.setattr(thresholded, "decompose_wide", lambda *parts: calls.append(parts) or decompose(*parts))
    with torch.no_grad():
        for place in (0, 2, 4, 6):
            net[place].parametrizations.weight.original.mul_(1.01)
    net(x)
    assert not calls
    thresholds.hard_ranks()
    assert len(calls) == 4
    thresholds.margins()
    assert len(calls) == 4  # nothing has changed since


def trained(net, thresholds, x, steps):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        thresholds.clamp_()
        net.eval()(x)  # a validation in between must not count as a step
        net.train()


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_resumed_training_is_the_uninterrupted_one(every, dtype):
    for halt in (1, 5):
        straight, _, thresholds, x = perceptron(dtype, refresh_every=every)
        trained(straight, thresholds, x, 8)
        halfway, _, thresholds, _ = perceptron(dtype, refresh_every=every)
        trained(halfway, thresholds, x, halt)
        resumed, _, thresholds, _ = perceptron(dtype, seed=1, refresh_every=every)
        resumed.load_state_dict(copy.deepcopy(halfway.state_dict()))
        trained(resumed, thresholds, x, 8 - halt)
        torch.testing.assert_close(resumed.state_dict(), straight.state_dict(), rtol=0, atol=0)


def test_a_state_without_a_basis_loads():
    net, _, thresholds, x = perceptron()
    state = {key: value for key, value in net.state_dict().items() if "extra_state" not in key}
    net(x)
    net.load_state_dict({**state, "rank_thresholds._extra_state": {}})
    assert net(x).isfinite().all()
    assert all(step.basis is not None for step in thresholds._steps)


@pytest.mark.parametrize("every", [1, 4])
def test_no_step_after_the_first_waits(every):
    torch.manual_seed(0)
    layers = [part for _ in range(3) for part in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    net = nn.Sequential(nn.Conv2d(3, 8, 1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    x = torch.randn(16, 3, 6, 6)
    settings = ChoiceSettings(budget=0.6, masks=True, ranks=True, rates=ChoiceRates(refresh_every=every))
    network = BudgetedNetwork(net, settings, inputs=x)
    choice = Choice(network, ChoiceRates())
    network.begin()
    optimizer = torch.optim.SGD([p for n, p in net.named_parameters() if "original" in n], lr=0.01, foreach=True)
    for step in range(10):
        with Waits() as waits:
            choice.act(step / 10)
            optimizer.zero_grad()
            net(x).square().mean().backward()
            choice.step()
            optimizer.step()
        assert step == 0 or waits.found == [], step
