"""Steps of scores and thresholds: against Adam written anew in float64, and steps that are left out."""

import torch
from torch import nn

from lightning_plugins.compression.budget.choice_optimizer import ChoiceOptimizer


def test_it_is_adam_with_one_second_moment_for_a_kind():
    generator = torch.Generator().manual_seed(0)
    scores, thresholds = (
        [nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64)) for size in sizes]
        for sizes in ([(5,), (3,)], [(), ()])
    )
    expected = [torch.cat([p.detach().flatten() for p in kind]) for kind in (scores, thresholds)]
    optimizer = ChoiceOptimizer([scores, thresholds])
    average, square = [torch.zeros(8).double(), torch.zeros(2).double()], [0.0, 0.0]
    for step in range(1, 6):
        rates = [0.1 / step, 0.01]
        for kind, parameters in enumerate((scores, thresholds)):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 10 ** (-kind)
            # Without what the scores of a group have in common; a threshold is alone.
            alone = [p.grad if p.ndim == 0 else p.grad - p.grad.mean() for p in parameters]
            gradient = torch.cat([grad.flatten() for grad in alone])
            average[kind] = 0.9 * average[kind] + 0.1 * gradient
            square[kind] = 0.999 * square[kind] + 0.001 * float(gradient.square().mean())
            root = (square[kind] / (1 - 0.999**step)) ** 0.5
            expected[kind] = expected[kind] - rates[kind] * average[kind] / (1 - 0.9**step) / root
        optimizer.step(rates)
    for parameters, one in zip((scores, thresholds), expected, strict=True):
        torch.testing.assert_close(torch.cat([p.detach().flatten() for p in parameters]), one, rtol=1e-9, atol=1e-12)


def test_a_larger_gradient_moves_further():
    score = nn.Parameter(torch.zeros(4))
    optimizer = ChoiceOptimizer([[score]])
    score.grad = torch.tensor([1e-5, -1e-5, 1e-7, -1e-7])
    optimizer.step([0.1])
    torch.testing.assert_close(score[0] / score[2], torch.tensor(100.0))


def test_a_step_that_is_not_finite_changes_nothing():
    score = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = ChoiceOptimizer([[score]])
    for gradient in (1.0, torch.inf, torch.nan):
        score.grad = torch.tensor([gradient, -1.0])
        optimizer.step([0.1])
    torch.testing.assert_close(score.detach(), torch.tensor([0.9, 2.1]))
    assert optimizer.steps == 1
    assert score.grad is None


def test_parameters_without_a_gradient_stay():
    score, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = ChoiceOptimizer([[score, other]])
    score.grad = torch.tensor([1.0, 0.0])
    optimizer.step([0.1])
    assert other.tolist() == [1.0] * 3
    assert score[0] < 1 < score[1]


def test_what_a_group_has_in_common_is_left_out():
    score = nn.Parameter(torch.zeros(3))
    optimizer = ChoiceOptimizer([[score]])
    score.grad = torch.tensor([5.0, 5.0, 5.0])
    optimizer.step([0.1])
    assert score.tolist() == [0.0] * 3
