"""The cost of a network that is being chosen in, and the choice."""

from typing import Any

import torch

from lightning_plugins.compression.budget.budgeted_network import BudgetedNetwork
from lightning_plugins.compression.budget.filling import ChoiceSettings
from tests.callbacks.budgets import seeded


def network(budget: float = 0.5, groups: Any = None, **settings: Any) -> BudgetedNetwork:
    inputs = torch.zeros(2, 6, dtype=torch.float64)
    wanted = ChoiceSettings(budget=budget, **{"masks": True, "ranks": True, **settings})
    return BudgetedNetwork(seeded(), wanted, inputs=inputs, groups=groups)


def test_thresholds_have_a_slope_while_every_layer_is_cheaper_as_one():
    chosen = network(masks=False)
    chosen.be_soft(10.0)
    share, ranks = chosen.share()
    plain = chosen.budget.share(None, chosen.thresholds.soft_ranks())
    torch.testing.assert_close(share, plain)  # the value is the budget's
    assert share == 1
    slopes = torch.autograd.grad(share, chosen.parameters())
    sides = chosen.budget.sides()
    for slope, threshold, name in zip(slopes, chosen.parameters(), ranks, strict=True):
        (of_rank,) = torch.autograd.grad(chosen.thresholds.soft_ranks()[name], threshold)
        torch.testing.assert_close(slope, of_rank * sum(sides[name]) / 399)
        assert slope < 0


def test_a_choice_that_was_made_is_not_filled_up_again():
    chosen = network(ranks=False)
    kept = [torch.arange(group.size) < 2 for group in chosen.groups]
    chosen.be_hard(kept)
    again = network(ranks=False, groups=chosen.state_dict()["groups"])
    assert sum(keep.sum() for keep in again.choose().kept) > 2 * len(kept)  # before: filled up to the budget
    again.load_state_dict(chosen.state_dict())
    for one in (chosen, again):
        assert [keep.tolist() for keep in one.choose().kept] == [keep.tolist() for keep in kept]


def test_the_budget_is_filled_with_the_best_and_never_passed():
    for budget in (0.2, 0.35, 0.5, 0.8):
        chosen = network(budget, ranks=False)
        with torch.no_grad():
            for scores in chosen.masks.scores:
                scores.copy_(-torch.rand(scores.shape, generator=torch.Generator().manual_seed(len(scores))) - 0.1)
        choice = chosen.choose()
        assert choice.cost <= budget * 399 < choice.cost + 30  # no unit costs more
        for keep, scores in zip(choice.kept, chosen.masks.scores, strict=True):
            if 1 < keep.sum() < len(keep):
                assert scores[keep].min() > scores[~keep].max()
