"""The cost of masks and ranks against the network that is left, and a projection that is always within the budget."""

import copy
from functools import cache

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from lightning_plugins.compression import (
    Budget,
    Multiplier,
    apply_masks,
    apply_thresholds,
    bake,
    channel_groups,
    factorize,
    project,
    restore_structure,
    shrink,
)
from tests.compression.networks import NETWORKS, build, draw_kept

RANKS = {
    "residual": ("blocks.0.0", "blocks.1.6", "head"),
    "branches": ("left", "last"),
    "transformer": ("attention.0.qkv", "attention.1.proj", "up.0", "down.0"),
}


def counted(net, x, cost):
    if cost == "params":
        return sum(parameter.numel() for parameter in net.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    return counter.get_total_flops()


@cache
def prepared(name, cost):
    net, x = build(name)
    groups = channel_groups(net, x)
    inputs = x if cost == "flops" else None
    return net, x, groups, Budget(net, groups, RANKS[name], target=1.0, cost=cost, inputs=inputs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cost", ["params", "flops"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_cost_is_that_of_the_smaller_network_exactly(name, cost, seed):
    net, x, groups, budget = prepared(name, cost)
    assert budget.dense == counted(net, x, cost)
    kept = draw_kept(groups, seed)
    small = copy.deepcopy(net)
    shrink(small, groups, kept)
    assert budget.cost(kept) == counted(small, x, cost) < budget.dense
    ranks = dict.fromkeys(RANKS[name], 1 + seed)
    expected = budget.cost(kept, ranks)
    factorize(
        small, {k: min(r, *small.get_submodule(k).weight.flatten(1).shape) for k, r in ranks.items()}, list(ranks)
    )
    assert expected == counted(small, x, cost) < budget.cost(kept)
    soft = budget.share([keep.double() for keep in kept], {k: torch.tensor(float(r)) for k, r in ranks.items()})
    assert soft.item() * budget.dense == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("cost", ["params", "flops"])
def test_masks_and_thresholds_on_the_network_do_not_change_its_budget(cost):
    net, x, groups, plain = prepared("transformer", cost)
    net = copy.deepcopy(net)
    apply_masks(net, groups)
    apply_thresholds(net, list(RANKS["transformer"]), init=0.1)
    inputs = x if cost == "flops" else None
    budget = Budget(net, groups, RANKS["transformer"], target=0.5, cost=cost, inputs=inputs)
    assert budget.dense == plain.dense
    kept = draw_kept(groups)
    assert budget.cost(kept, {"up.0": 2}) == plain.cost(kept, {"up.0": 2})
    assert budget.limit == plain.dense // 2


@pytest.mark.parametrize("name", NETWORKS)
def test_the_gradient_is_that_of_finite_differences(name):
    _, _, groups, budget = prepared(name, "flops")
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(g.size, generator=generator, dtype=torch.float64, requires_grad=True) for g in groups]
    ranks = [torch.tensor(1.5 + i, dtype=torch.float64, requires_grad=True) for i in range(len(RANKS[name]))]

    def share(*inputs):
        return budget.share(inputs[: len(masks)], dict(zip(RANKS[name], inputs[len(masks) :], strict=True)))

    assert gradcheck(share, (*masks, *ranks))


@pytest.mark.parametrize("target", [0.75, 0.55, 0.45])
@pytest.mark.parametrize("cost", ["params", "flops"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_delivered_network_is_within_the_budget(name, cost, target):
    """54 runs in all: the network is masked, thresholded, projected, shrunken and factorised, and then counted."""
    original, x, groups, full = prepared(name, cost)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        net = copy.deepcopy(original)
        masks = apply_masks(net, groups)
        thresholds = apply_thresholds(net, list(RANKS[name]), init=0.05)
        for parameter in (*masks.scores, *thresholds.values):
            parameter.data.add_(
                torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 0.7 * (seed > 0)
            )
        thresholds.clamp_()
        full.target, full.limit = target, int(target * full.dense)
        multiple = (1, 2, 1)[seed]
        result = project(
            full, masks.kept(), list(masks.scores), thresholds.hard_ranks(), thresholds.margins(), multiple_of=multiple
        )
        masks.set_kept(result.kept)
        bake(net)
        before = net(x)
        shrink(net, groups, result.kept)
        torch.testing.assert_close(net(x), before, rtol=1e-9, atol=1e-9)
        ranks = {k: min(r, *net.get_submodule(k).weight.flatten(1).shape) for k, r in result.ranks.items()}
        if ranks:
            factorize(net, ranks, list(ranks))
        assert counted(net, x, cost) == result.cost <= target * full.dense
        assert all(keep.any() for keep in result.kept)
        fresh = build(name, seed=9)[0]
        restore_structure(fresh, net.state_dict()).load_state_dict(net.state_dict())
        torch.testing.assert_close(fresh(x), net(x), rtol=0, atol=0)


def test_the_least_useful_leaves_first():
    net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 2))
    groups = channel_groups(net, torch.zeros(1, 6))
    budget = Budget(net, groups, target=0.6)
    scores = [torch.linspace(0.1, 1, 10), torch.linspace(0.55, 2, 8)]
    result = project(budget, [torch.ones(10).bool(), torch.ones(8).bool()], scores)
    least = min(score[keep].min() for score, keep in zip(scores, result.kept, strict=True))
    assert least >= max(score[~keep].max() for score, keep in zip(scores, result.kept, strict=True) if not keep.all())
    taken_back = [keep.clone() for keep in result.kept]
    index = max(range(2), key=lambda i: scores[i][~taken_back[i]].max() if not taken_back[i].all() else -1)
    place = torch.where(taken_back[index], -1.0, scores[index]).argmax()
    taken_back[index][place] = True
    assert budget.cost(taken_back) > budget.limit >= result.cost


def test_numbers_are_multiples_and_not_below_the_minimum():
    net = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 2))
    groups = channel_groups(net, torch.zeros(1, 6))
    budget = Budget(net, groups, ("2",), target=0.4)
    kept = [torch.arange(30) < 29, torch.arange(20) < 3]
    scores, margins = [torch.rand(30), torch.rand(20)], {"2": torch.linspace(1, 0, 20)}
    result = project(budget, kept, scores, {"2": 13}, margins, min_channels=8, multiple_of=8)
    assert [int(keep.sum()) % 8 for keep in result.kept] == [0, 0]
    assert all(int(keep.sum()) >= 8 for keep in result.kept)
    assert result.ranks.get("2", 8) % 8 == 0
    assert result.cost <= budget.limit


def test_numbers_of_heads_are_no_multiples():
    net, x = build("transformer")
    groups = channel_groups(net, x)
    assert [group.size for group in groups if group.attention] == [4, 4]
    budget = Budget(net, groups, target=0.99)
    kept = [torch.arange(group.size) < (2 if group.attention else group.size // 2 + 1) for group in groups]
    result = project(budget, kept, [torch.ones(group.size) for group in groups], multiple_of=3)
    for group, keep in zip(groups, result.kept, strict=True):
        assert int(keep.sum()) == 2 if group.attention else int(keep.sum()) % 3 == 0 or bool(keep.all())


def test_a_layer_that_is_kept_whole_stays_whole():
    net, x = build("residual")
    groups = channel_groups(net, x, keep="stem.0")
    budget = Budget(net, groups, target=0.6)
    result = project(budget, [torch.ones(g.size).bool() for g in groups], [torch.rand(g.size) for g in groups])
    shrink(net, groups, result.kept)
    assert net.stem[0].out_channels == 12


def test_the_multiplier_finds_the_budget_and_resumes():
    size = torch.tensor(1.0, requires_grad=True)
    multiplier, other = Multiplier(rate=0.2), Multiplier(rate=0.2)
    for step in range(400):
        loss = (size - 1).square() + multiplier.penalty(size, 0.4)
        (gradient,) = torch.autograd.grad(loss, size)
        size.data -= 0.05 * gradient
        multiplier.update(size.item(), 0.4)
        if step == 200:
            other.load_state_dict(multiplier.state_dict())
            assert other.value == multiplier.value > 0
    assert size.item() == pytest.approx(0.4, abs=5e-3)
    assert Multiplier().update(0.1, 0.4) == 0.0  # below the target it does not become negative


def bad_calls():
    net, x, groups, budget = prepared("residual", "params")
    kept, scores = [torch.ones(g.size).bool() for g in groups], [torch.ones(g.size) for g in groups]
    tight = Budget(net, groups, target=0.01)
    return [
        (lambda: Budget(net, target=0.0), "`target` must be above 0"),
        (lambda: Budget(net, target=40), "did you mean 0.4"),
        (lambda: Budget(net, target=0.4, cost="flop"), "did you mean 'flops'"),
        (lambda: Budget(net, target=0.4, cost="flops"), "`inputs` must be given"),
        (lambda: Budget(net, target=0.4, inputs=x), "`inputs` must be left out"),
        (lambda: Budget(net, ranks=["stem.2"], target=0.4), "`ranks` must name layers"),
        (lambda: budget.cost(kept[:1]), "`kept` must have a tensor of shape"),
        (lambda: budget.cost(kept, {"stem.0": 1}), "`ranks` must be of layers named"),
        (lambda: project(tight, kept, scores), "`budget.target` must be at least"),
        (lambda: project(budget, kept, scores, min_channels=0), "`min_channels` must be at least 1"),
        (lambda: project(budget, kept, scores, multiple_of=0), "`multiple_of` must be at least 1"),
        (lambda: project(budget, kept, scores[:2]), "`scores` must have one tensor"),
        (lambda: project(budget, kept[:2], scores), "`kept` must have one mask"),
        (lambda: project(budget, kept, scores, {"head": 2}), "`margins` must have an entry"),
        (lambda: Multiplier(rate=-1), "`rate` must be at least 0"),
        (lambda: Multiplier(damping=-1), "`damping` must be at least 0"),
    ]


@pytest.mark.parametrize("index", range(16))
def test_bad_inputs_are_named(index):
    call, message = bad_calls()[index]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_a_compiled_part_is_looked_into():
    plain = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(3, 4)
    groups = channel_groups(plain, x)
    net = copy.deepcopy(plain)
    net[0] = torch.compile(net[0], backend="eager")
    assert channel_groups(net, x) == groups
    kept = [torch.arange(group.size) > 0 for group in groups]
    flops = Budget(net, groups, ["0.2"], target=0.9, cost="flops", inputs=x)
    assert flops.cost(kept) == Budget(plain, groups, target=0.9, cost="flops", inputs=x).cost(kept)
    apply_masks(net, groups).set_kept(kept)
    masked = net(x)
    bake(net)
    shrink(net, groups, kept)
    torch.testing.assert_close(net(x), masked)


class LoneMatrix(nn.Module):
    """Products with a parameter of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.weight = nn.Parameter(torch.randn(8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).relu()
        return self.last(hidden * (hidden @ self.weight).sigmoid())


def test_products_with_a_matrix_of_no_layer_are_counted():
    net, x = LoneMatrix(), torch.randn(5, 4)
    groups = channel_groups(net, x)
    budget = Budget(net, groups, target=0.9, cost="flops", inputs=x)
    assert budget.dense == counted(net, x, "flops") == 2 * 5 * (4 * 8 + 8 + 8 * 3)
    kept = [torch.arange(8) < 3]
    shrink(net, groups, kept)
    assert budget.cost(kept) == counted(net, x, "flops") == 2 * 5 * (4 * 3 + 3 + 3 * 3)
