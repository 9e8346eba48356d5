"""Masks against float64 references, finite differences, and extreme temperatures."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from lightning_plugins.functional import annealed_sigmoid, hard_concrete, hard_concrete_open, straight_through

SCORES = torch.tensor([-3.0, -0.4, -1e-3, 0.2, 1.0, 5.0], dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.5, 1.0, 7.0])
def test_annealed_sigmoid_is_the_logistic_function(beta):
    expected = torch.tensor([1 / (1 + math.exp(-beta * score)) for score in SCORES.tolist()], dtype=torch.float64)
    torch.testing.assert_close(annealed_sigmoid(SCORES, beta), expected)
    scores = SCORES.clone().requires_grad_()
    assert gradcheck(lambda s: annealed_sigmoid(s, beta), scores)
    torch.testing.assert_close(
        torch.autograd.grad(annealed_sigmoid(scores, beta).sum(), scores)[0], beta * expected * (1 - expected)
    )


def test_straight_through_is_the_step_with_the_gradient_of_the_sigmoid():
    scores, smooth = SCORES.clone().requires_grad_(), SCORES.clone().requires_grad_()
    weights = torch.arange(1.0, 7, dtype=torch.float64)
    mask = straight_through(scores, 3.0)
    torch.testing.assert_close(mask, torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.float64))
    (mask * weights).sum().backward()
    (annealed_sigmoid(smooth, 3.0) * weights).sum().backward()
    torch.testing.assert_close(scores.grad, smooth.grad)


def test_hard_concrete_follows_its_definition_and_its_probability():
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64)
    noise = torch.rand(40_000, 3, generator=generator, dtype=torch.float64)
    mask = hard_concrete(scores.expand(40_000, 3), noise)
    u, a = noise[0, 1].item(), 0.0
    gate = 1 / (1 + math.exp(-(math.log(u / (1 - u)) + a) / (2 / 3)))
    assert mask[0, 1].item() == pytest.approx(min(1.0, max(0.0, 1.2 * gate - 0.1)))
    torch.testing.assert_close((mask > 0).double().mean(0), hard_concrete_open(scores), atol=0.01, rtol=0)


def test_hard_concrete_has_the_gradient_of_finite_differences():
    scores = torch.tensor([-1.0, 0.1, 0.9], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([0.6, 0.5, 0.3], dtype=torch.float64)
    assert gradcheck(lambda s: hard_concrete(s, noise), scores)
    assert gradcheck(hard_concrete, scores)
    assert gradcheck(hard_concrete_open, scores)


@pytest.mark.parametrize("beta", [1e-30, 1e30])
@pytest.mark.parametrize("mask", [annealed_sigmoid, straight_through])
def test_extreme_temperatures_stay_finite(mask, beta):
    scores = torch.tensor([-1e10, -1.0, 0.0, 1e-20, 1e10], requires_grad=True)
    value = mask(scores, beta)
    value.sum().backward()
    assert value.isfinite().all()
    assert ((value >= 0) & (value <= 1)).all()
    assert scores.grad.isfinite().all()


def test_noise_at_the_ends_stays_finite():
    scores = torch.tensor([-50.0, 50.0], requires_grad=True)
    value = hard_concrete(scores, torch.tensor([1.0, 0.0]), temperature=1e-3)
    value.sum().backward()
    assert value.isfinite().all()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: annealed_sigmoid(SCORES, 0.0), "`beta` must be positive, got 0.0"),
        (lambda: straight_through(SCORES, -1.0), "`beta` must be positive, got -1.0"),
        (lambda: annealed_sigmoid(torch.tensor([1]), 1.0), "`scores`"),
        (lambda: hard_concrete(SCORES, torch.rand(2)), "`noise` must have the shape"),
        (lambda: hard_concrete(SCORES, temperature=0), "`temperature` must be positive"),
        (lambda: hard_concrete(SCORES, low=0.1), "`low` must be below 0"),
        (lambda: hard_concrete_open(SCORES, high=1.0), "`high` must be above 1"),
    ],
)
def test_bad_inputs_are_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
