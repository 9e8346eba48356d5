import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_plugins.compression import (
    BeamOptions,
    beam_search,
    energy_threshold,
    equal_ratio,
    factorize,
    layer_costs,
    score_ranks,
    trade_off,
    truncated,
)

SELECTIONS = [equal_ratio, energy_threshold, trade_off]


def make_net(seed=0):
    """Four layers of different shapes and spectra; the last cannot become cheaper."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1)
    )
    for index, layer in enumerate(net[::2]):
        decay = torch.exp(-0.3 * index * torch.arange(layer.weight.shape[0]))
        layer.weight.data = (1 + index) * torch.randn_like(layer.weight) * decay[:, None]
    return net.double()


def share(costs, ranks):
    dense = sum(cost.dense for cost in costs.values())
    return sum(cost.at(rank) for cost, rank in zip(costs.values(), ranks, strict=True)) / dense


def spectra(net):
    return [torch.linalg.svdvals(layer.weight.detach()).square() for layer in net[::2]]


def all_ranks(costs):
    """Every choice of ranks; dense as the full rank."""
    return itertools.product(*([*range(1, cost.break_even + 1), cost.full_rank] for cost in costs.values()))


def dense_where_no_gain(costs, ranks):
    return tuple(
        rank if rank <= cost.break_even else cost.full_rank for cost, rank in zip(costs.values(), ranks, strict=True)
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", [0.95, 0.7, 0.5, 0.34])
def test_equal_ratio_is_the_largest_common_fraction(budget, seed):
    net = make_net(seed)
    costs = layer_costs(net)
    best = None
    for numerator in range(1, 841):  # every k / full rank is a whole number of 1 / 840
        chosen = dense_where_no_gain(costs, [max(1, cost.full_rank * numerator // 840) for cost in costs.values()])
        best = chosen if share(costs, chosen) <= budget else best
    found = equal_ratio(net, budget=budget)
    assert tuple(found.ranks.values()) == best
    assert found.share == share(costs, best)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", [0.95, 0.7, 0.5, 0.34])
def test_energy_threshold_keeps_as_much_of_every_layer_as_it_can(budget, seed):
    net = make_net(seed)
    costs, energies = layer_costs(net), spectra(net)
    kept = [(energy.cumsum(0) / energy.sum()).tolist() for energy in energies]
    best, most = None, 0.0
    for threshold in sorted({value for layer in kept for value in layer}):
        ranks = [next(i for i, value in enumerate(layer) if value >= threshold - 1e-12) + 1 for layer in kept]
        if share(costs, chosen := dense_where_no_gain(costs, ranks)) <= budget:
            best, most = chosen, threshold
    found = energy_threshold(net, budget=budget)
    assert tuple(found.ranks.values()) == best
    assert all(layer[rank - 1] >= most - 1e-12 for layer, rank in zip(kept, best, strict=True))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", [0.95, 0.7, 0.5, 0.34])
def test_trade_off_has_the_least_error_at_its_cost(budget, seed):
    net = make_net(seed)
    costs, energies = layer_costs(net), spectra(net)

    def error(ranks):
        return math.fsum(float(energy[rank:].sum()) for energy, rank in zip(energies, ranks, strict=True))

    found = trade_off(net, budget=budget)
    ranks = tuple(found.ranks.values())
    least = min(error(other) for other in all_ranks(costs) if share(costs, other) <= found.share)
    assert error(ranks) == pytest.approx(least, rel=1e-9)


def test_trade_off_is_exact_at_every_price():
    net = make_net()
    costs, energies = layer_costs(net), spectra(net)
    reached = {tuple(trade_off(net, budget=budget / 200).ranks.values()) for budget in range(67, 200)}
    best = set()
    for price in torch.logspace(-4, 3, 4000).tolist():
        choice = []
        for cost, energy in zip(costs.values(), energies, strict=True):
            options = [*range(1, cost.break_even + 1), cost.full_rank]
            choice.append(min(options, key=lambda r, c=cost, e=energy: float(e[r:].sum()) + price * c.at(r)))
        best.add(tuple(choice))
    inside = {ranks for ranks in best if 0.34 < share(costs, ranks) < 0.995}
    assert inside
    assert inside <= reached


@settings(max_examples=25, deadline=None)
@given(
    budget=st.floats(0.34, 0.99),
    scheme=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
    selection=st.sampled_from(SELECTIONS),
    flops=st.booleans(),
)
def test_the_budget_is_met_and_less_is_left_for_less(budget, scheme, seed, selection, flops):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.Flatten(), nn.Linear(12, 9))
    inputs = torch.zeros(1, 3, 7, 7)
    settings = {"cost": "flops", "inputs": inputs} if flops else {}
    costs = layer_costs(net, scheme=scheme, **settings)
    least = share(costs, [1] * 3)
    budget = max(budget, least)
    found = selection(net, budget=budget, scheme=scheme, **settings)
    assert found.share == share(costs, found.ranks.values()) <= budget
    less = selection(net, budget=(budget + least) / 2, scheme=scheme, **settings)
    assert all(one >= other for one, other in zip(found.ranks.values(), less.ranks.values(), strict=True))
    assert (found.score, found.evaluations, found.trace) == (None, 0, ())


@pytest.mark.parametrize("selection", SELECTIONS)
def test_factorising_removes_what_was_said(selection):
    net = make_net()
    before = sum(layer.weight.numel() for layer in net[::2])
    found = selection(net, budget=0.5)
    factorize(net, found.ranks)
    after = sum(p.numel() for name, p in net.named_parameters() if name.endswith("weight"))
    assert after / before == pytest.approx(found.share)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_weights_of_zeros_and_of_rank_one_have_ranks(selection):
    net = make_net()
    net[0].weight.data.zero_()
    net[2].weight.data = torch.outer(torch.arange(8.0), torch.ones(9)).double()
    found = selection(net, budget=0.6)
    assert found.share <= 0.6
    assert all(rank >= 1 for rank in found.ranks.values())


@pytest.mark.parametrize("selection", [energy_threshold, trade_off])
def test_weights_that_are_not_finite_are_refused(selection):
    net = make_net()
    net[2].weight.data[0, 0] = math.inf
    with pytest.raises(ValueError, match="weight of '2' must be finite"):
        selection(net, budget=0.6)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"budget": 0.1}, ValueError, "`budget` must be at least 0.280423 for these 4 layers, which rank 1"),
        ({"budget": 0}, ValueError, "`budget` must be more than 0"),
        ({"budget": "0.5"}, TypeError, "`budget` must be a number"),
        ({"layers": "9"}, ValueError, "no module is called '9'"),
        ({"layers": "1"}, ValueError, "'1' must be a layer that can be split"),
        ({"cost": "latency"}, ValueError, "`cost` must be"),
        ({"inputs": torch.zeros(1, 7)}, ValueError, "`inputs` must be left out"),
    ],
    ids=["impossible", "zero", "text", "no layer", "no matrix", "cost", "inputs"],
)
def test_bad_arguments_are_named(selection, change, error, message):
    with pytest.raises(error, match=message):
        selection(make_net(), **{"budget": 0.6, **change})


def test_the_least_possible_budget_is_named_and_possible():
    net = make_net()
    with pytest.raises(ValueError, match="must be at least") as raised:
        equal_ratio(net, budget=0.01)
    least = float(str(raised.value).split("at least ")[1].split()[0])
    for selection in SELECTIONS:
        ranks = selection(net, budget=least + 1e-6).ranks
        assert set(ranks.values()) == {1}


def test_layers_that_a_pass_of_the_inputs_does_not_reach_have_no_share():
    net = nn.ModuleDict({"spare": nn.Linear(5, 5), "used": nn.ReLU()})
    net.forward = net["used"].forward
    with pytest.raises(ValueError, match="`inputs` must reach a layer"):
        equal_ratio(net, budget=0.7, cost="flops", inputs=torch.zeros(1, 5))


def score(net, x):
    return -net(x).square().sum(), len(x)


def test_score_ranks_truncates_and_puts_back():
    net = make_net().train()
    batches = list(torch.randn(3, 5, 7).double())
    weights = [layer.weight.clone() for layer in net[::2]]
    ranks = {"0": 2, "2": 99, "4": 1}
    found = score_ranks(net, ranks, batches, score)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(net[::2], weights, strict=True))
    assert net.training
    with torch.no_grad():
        net[0].weight.copy_(truncated(net[0], 2))
        net[4].weight.copy_(truncated(net[4], 1))
        assert found == pytest.approx(float(sum(score(net, x)[0] for x in batches) / 15), rel=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ranks": {}}, TypeError, "`ranks` must give the rank of at least one layer"),
        ({"ranks": [1, 2]}, TypeError, "`ranks` must give"),
        ({"ranks": {"0": 0}}, ValueError, r"`ranks\['0'\]` must be at least 1"),
        ({"ranks": {"0": 1.0}}, TypeError, r"`ranks\['0'\]` must be an int"),
        ({"ranks": {"7": 1}}, ValueError, "no module is called '7'"),
        ({"batches": iter([1])}, ValueError, "which is exhausted after one pass"),
        ({"batches": []}, ValueError, "`batches` must give at least one batch"),
    ],
    ids=["no ranks", "a list", "rank 0", "no int", "no layer", "iterator", "no batches"],
)
def test_score_ranks_names_bad_arguments(change, error, message):
    good = {"ranks": {"0": 1}, "batches": [torch.randn(2, 7).double()], "score": score}
    with pytest.raises(error, match=message):
        score_ranks(make_net(), **{**good, **change})


def test_the_search_is_no_worse_than_what_looks_at_no_data():
    net = make_net()
    x = torch.randn(64, 7).double()
    with torch.no_grad():
        y = net(x)

    def closeness(net, batch):
        return -(net(batch[0]) - batch[1]).square().mean()

    found = beam_search(net, [(x, y)], closeness, budget=0.5, options=BeamOptions(step=1, width=8))
    for selection in SELECTIONS:
        assert found.score >= score_ranks(net, selection(net, budget=0.5).ranks, [(x, y)], closeness)
