"""Where scores and thresholds move for a network to have a given cost."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_plugins.compression.budget.budgeted_network import BudgetedNetwork
from lightning_plugins.compression.budget.filling import ChoiceSettings
from tests.callbacks.budgets import seeded
from tests.compression.networks import NETWORKS, build


def network(budget: float = 0.5, beta: float = 10.0, **changes: Any) -> BudgetedNetwork:
    wanted = ChoiceSettings(budget=budget, **{"masks": True, "ranks": True, **changes})
    chosen = BudgetedNetwork(seeded(), wanted, inputs=torch.zeros(2, 6, dtype=torch.float64))
    chosen.begin()
    chosen.be_soft(beta)
    return chosen


@pytest.mark.parametrize(("masks", "ranks"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("beta", [1.0, 10.0, 100.0])
def test_the_cost_is_the_wanted_one(masks, ranks, beta):
    chosen = network(beta=beta, masks=masks, ranks=ranks)
    for done in (0.3, 0.6, 1.0):
        share, left = chosen.shift.settle(chosen.spectra(), done)
        now = [] if chosen.masks is None else [keep.double() for keep in chosen.kept()]
        torch.testing.assert_close(share, chosen.budget.share(now, left), rtol=1e-5, atol=1e-5)  # and has been moved to
        wanted = chosen.shift.whole + (0.5 - chosen.shift.whole) * done
        bent = float(chosen.budget.share(now, left, bend=done))
        step = 0.08  # the cost of one unit or singular value
        assert wanted - step < bent <= wanted + 1e-5
    assert share <= 0.5 + 1e-5


def test_there_and_back():
    chosen = network(ranks=False)
    chosen.shift.settle([], 0.5)
    before = [scores.detach().clone() for scores in chosen.masks.scores]
    chosen.shift.settle([], 0.5)
    torch.testing.assert_close(list(chosen.masks.scores), before, rtol=1e-3, atol=1e-3)  # it costs that already


def test_scores_fall_alike():
    chosen = network(ranks=False)
    before = torch.cat([scores.detach().clone() for scores in chosen.masks.scores])
    chosen.shift.settle([], 0.7)
    moved = before - torch.cat([scores.detach() for scores in chosen.masks.scores])
    torch.testing.assert_close(moved, moved[:1].expand_as(moved))
    assert moved[0] > 0


def test_no_threshold_makes_a_weight_zero():
    """A mask lowers a layer's singular values, which the thresholds of others do not know of."""
    chosen = network(0.05)
    with torch.no_grad():
        chosen.masks.scores[0].fill_(-3.0)
        chosen.model(torch.zeros(2, 6, dtype=torch.float64))
    spectra = chosen.spectra()
    with torch.no_grad():
        for value in chosen.thresholds.values:
            value.fill_(5.0)  # far above
    _, ranks = chosen.shift.settle(spectra, 1.0)
    for index, values in enumerate(spectra):
        tau = chosen.thresholds.tau(index).detach()
        torch.testing.assert_close(tau, 0.9 * values[-1])
        assert int(ranks[chosen.thresholds.layers[index]]) == int((values > tau).sum()) >= 1


def test_thresholds_rise_alike_and_count_what_they_leave():
    chosen = network(masks=False)
    share, ranks = chosen.shift.settle(chosen.spectra(), 1.0)
    values = torch.stack([value.detach() for value in chosen.thresholds.values])
    torch.testing.assert_close(values, values[:1].expand_as(values))
    assert {name: int(rank) for name, rank in ranks.items()} == chosen.thresholds.hard_ranks()
    assert share <= 0.5 + 1e-9


def test_nothing_is_gone_at_the_beginning():
    chosen = network(beta=1.0)
    share, ranks = chosen.shift.settle(chosen.spectra(), 0.0)
    assert share > 0.98
    assert {name: int(rank) for name, rank in ranks.items()} == chosen.shift.sizes
    assert not any(chosen.thresholds.values)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(NETWORKS)),
    budget=st.floats(0.3, 0.9),
    seed=st.integers(0, 9),
    cost=st.sampled_from(["params", "flops"]),
)
def test_the_cost_is_met_along_the_way_in_every_network(name, budget, seed, cost):
    torch.manual_seed(seed)
    net, inputs = build(name)
    chosen = BudgetedNetwork(net, ChoiceSettings(budget=budget, cost=cost, masks=True, ranks=True), inputs=inputs)
    chosen.begin()
    for done, beta in ((0.25, 3.0), (0.5, 10.0), (0.75, 30.0), (1.0, 100.0)):
        chosen.be_soft(beta)
        share, ranks = chosen.shift.settle(chosen.spectra(), done)
        wanted = chosen.shift.whole + (budget - chosen.shift.whole) * done
        bent = chosen.budget.share([keep.double() for keep in chosen.kept()], ranks, bend=done)
        assert bent <= wanted + 1e-5
        assert share <= bent + 1e-9
