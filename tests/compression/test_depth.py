"""Blocks as units: gates and their gradients, exact costs, removal, and networks that are built again from keys."""

import copy
import itertools
import pickle
from functools import cache

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from lightning_plugins.compression import (
    Budget,
    Skipped,
    apply_masks,
    bake,
    find_blocks,
    find_channel_groups,
    load_compressed,
    masks_of,
    measure_network,
    project,
    quantize,
    remove_masks,
    restore_structure,
    save_compressed,
    shrink,
    skip_blocks,
)
from lightning_plugins.compression.costs.layer_costs import run
from lightning_plugins.compression.networks.tracing import tensors_in
from tests.compression.deep import BUILDERS, Block, Deep, build, gpt2

FAMILIES = list(BUILDERS)


@cache
def grouped(name):
    case = build(name)
    channels = find_channel_groups(case.net, case.inputs).groups
    return case, channels + find_blocks(case.net, case.inputs, case.blocks).groups


def outputs(net, inputs):
    return tensors_in(run(net, inputs))


def assert_same(found, wanted, tolerance=0.0):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def counted(net, inputs, cost):
    if cost == "params":
        return sum(parameter.numel() for parameter in net.parameters())
    with FlopCounterMode(display=False) as counter:
        run(net, inputs)
    return counter.get_total_flops()


def draw(groups, seed):
    generator = torch.Generator().manual_seed(seed)
    kept = [torch.rand(group.size, generator=generator) > 0.5 for group in groups]
    for group, keep in zip(groups, kept, strict=True):
        keep[0] |= not group.block
    return kept


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", FAMILIES)
def test_gated_and_removed_blocks_compute_the_same_at_the_cost_that_was_counted(name, seed):
    case, groups = grouped(name)
    kept = draw(groups, seed)
    net = copy.deepcopy(case.net)
    apply_masks(net, groups).set_kept(kept)
    gated = outputs(net, case.inputs)
    bake(net)
    shrink(net, groups, kept)
    assert_same(outputs(net, case.inputs), gated, 1e-9)
    gone = [group.block for group, keep in zip(groups, kept, strict=True) if group.block and not keep.any()]
    assert [name for name, module in net.named_modules() if isinstance(module, Skipped)] == gone
    for cost in ("params", "flops"):
        inputs = case.inputs if cost == "flops" else None
        budget = Budget(case.net, groups, target=0.5, cost=cost, inputs=inputs)
        assert budget.dense == counted(case.net, case.inputs, cost)
        assert budget.cost(kept) == counted(net, case.inputs, cost) < budget.dense


@pytest.mark.parametrize("name", ["bert", "timm", "resnet"])
@pytest.mark.parametrize("target", [0.7, 0.4])
def test_the_projection_is_within_the_budget_with_ranks_too(name, target):
    case, groups = grouped(name)
    block = next(group.block for group in groups if group.block)
    inside = next(
        n for n, m in case.net.named_modules() if n.startswith(block) and isinstance(m, nn.Linear | nn.Conv2d)
    )
    budget = Budget(case.net, groups, [inside], target=target, cost="flops", inputs=case.inputs)
    scores = [torch.rand(group.size, generator=torch.Generator().manual_seed(i)) for i, group in enumerate(groups)]
    margins = {inside: torch.linspace(1, 0, 6)}
    found = project(budget, [score > -1 for score in scores], scores, {inside: 6}, margins)
    assert found.cost <= target * budget.dense
    soft = budget.share(
        [keep.double() for keep in found.kept], {k: torch.tensor(float(r)) for k, r in found.ranks.items()}
    )
    assert soft.item() * budget.dense == pytest.approx(found.cost, rel=1e-12)


@pytest.mark.parametrize("cost", ["params", "flops"])
def test_soft_costs_are_those_of_all_hard_networks_weighted(cost):
    """The cost is linear in every mask: between zeros and ones it is the mean over hard masks drawn with these odds."""
    net = Deep(blocks=2, hidden=3).double().eval()
    x = torch.randn(2, 4, dtype=torch.float64)
    groups = find_channel_groups(net, x, ["blocks.0.up", "blocks.1.up"]).groups + find_blocks(net, x, "blocks.*").groups
    budget = Budget(net, groups, target=0.5, cost=cost, inputs=x if cost == "flops" else None)
    odds = torch.rand(sum(group.size for group in groups), generator=torch.Generator().manual_seed(0)).double()
    expected = 0.0
    for bits in itertools.product([False, True], repeat=len(odds)):
        chosen = torch.tensor(bits)
        weight = torch.where(chosen, odds, 1 - odds).prod().item()
        small = copy.deepcopy(net)
        parts = chosen.split([group.size for group in groups])
        if all(keep.any() for group, keep in zip(groups, parts, strict=True) if not group.block):
            shrink(small, groups, parts)
            expected += weight * counted(small, x, cost)
        else:  # a layer without channels, which `shrink` leaves to nobody
            expected += weight * budget.cost(parts)
    soft = budget.share(list(odds.split([group.size for group in groups]))).item() * budget.dense
    assert soft == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["tuples", "bert", "timm"])
def test_the_gradient_of_a_gate_is_that_of_finite_differences(name):
    case, groups = grouped(name)
    net = copy.deepcopy(case.net)
    blocks = [group for group in groups if group.block]
    masks = apply_masks(net, blocks, init=0.3)
    masks.set_beta(2.0)
    keys = {f"channel_masks.scores.{i}": score for i, score in enumerate(masks.scores)}
    kwargs = case.inputs if isinstance(case.inputs, dict) else {}
    args = () if kwargs else (case.inputs,)

    def loss(*scores):
        return tensors_in(functional_call(net, dict(zip(keys, scores, strict=True)), args, kwargs))[0].square().sum()

    assert gradcheck(loss, [score.detach().clone().requires_grad_() for score in keys.values()])
    masks.block_slopes.take()
    loss(*masks.scores).backward()
    slopes = masks.block_slopes.take()
    for i, score in enumerate(masks.scores):
        mask = torch.sigmoid(2.0 * score.detach())
        assert_same(slopes[i] * (2.0 * mask * (1 - mask)).squeeze(), score.grad.squeeze(), 1e-9)
    assert masks.block_slopes.take() == {}


@pytest.mark.parametrize("name", FAMILIES)
def test_open_gates_change_no_bit_of_outputs_and_gradients(name):
    case, groups = grouped(name)
    net = copy.deepcopy(case.net)
    masks = apply_masks(net, [group for group in groups if group.block])
    masks.set_hard()
    assert_same(outputs(net, case.inputs), outputs(case.net, case.inputs))
    grads = []
    for one in (net, copy.deepcopy(case.net)):
        out = one(**case.inputs) if isinstance(case.inputs, dict) else one(*tensors_in([case.inputs]))
        tensors_in(out)[0].square().sum().backward()
        grads.append({n: p.grad for n, p in one.named_parameters() if p.grad is not None})
    assert_same(grads[0], grads[1])
    masks.set_hard(False)
    masks.set_beta(1e4)
    assert_same(outputs(net, case.inputs), outputs(case.net, case.inputs))
    remove_masks(net)
    assert not any(module._forward_hooks or module._forward_hooks_with_kwargs for module in net.modules())


def test_gates_are_copied_and_pickled_with_their_masks():
    case, groups = grouped("tuples")
    groups = [group for group in groups if group.block]  # torch pickles no parametrizations
    net = copy.deepcopy(case.net)
    masks = apply_masks(net, groups)
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_same(outputs(again, case.inputs), outputs(net, case.inputs))
        other = masks_of(again)
        other.set_kept([torch.zeros(1, dtype=torch.bool) for _ in groups])
        assert not torch.equal(outputs(again, case.inputs)[0], outputs(net, case.inputs)[0])
        remove_masks(again)
        assert_same(outputs(again, case.inputs), outputs(case.net, case.inputs))
    assert not masks.is_hard


def test_gates_follow_autocast():
    case, groups = grouped("deep")
    net = copy.deepcopy(case.net).float()
    masks = apply_masks(net, [group for group in groups if group.block])
    masks.set_hard(False)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(case.inputs.float())
    out.float().square().sum().backward()
    assert all(score.grad.isfinite().all() and (score.grad != 0).all() for score in masks.scores)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_structure_is_rebuilt_from_keys_and_values_loaded(name):
    case, groups = grouped(name)
    small = copy.deepcopy(case.net)
    kept = draw(groups, 0)
    shrink(small, groups, kept)
    fresh = copy.deepcopy(case.net)
    restored = restore_structure(fresh, {f"model.{key}": value for key, value in small.state_dict().items()})
    restored.load_state_dict(small.state_dict())
    assert_same(outputs(restored, case.inputs), outputs(small, case.inputs))
    assert restore_structure(restored, small.state_dict()) is restored  # which it has already
    assert measure_network(restored, case.inputs, latency=False) == measure_network(small, case.inputs, latency=False)


@pytest.mark.parametrize("name", ["tuples", "bert", "gpt2", "timm"])
def test_a_folder_holds_a_network_with_skipped_blocks(name, tmp_path):
    case, _ = grouped(name)
    small = copy.deepcopy(case.net)
    skip_blocks(small, case.blocks.replace("*", "1"), case.inputs)
    save_compressed(small, tmp_path)
    make = BUILDERS[name][0]
    again = load_compressed(type(small) if name in {"bert", "gpt2"} else make, tmp_path)
    assert_same(outputs(again, case.inputs), outputs(small, case.inputs))


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_a_configuration_tells_how_many_blocks_are_left(name, tmp_path):
    case, _ = grouped(name)
    small = copy.deepcopy(case.net)
    skip_blocks(small, [case.blocks.replace("*", "0"), case.blocks.replace("*", "2")], case.inputs)
    save_compressed(small, tmp_path)
    plain = type(small).from_pretrained(tmp_path, dtype=torch.float64)
    assert plain.config.num_hidden_layers == 1
    assert small.config.num_hidden_layers == 3
    assert_same(outputs(plain, case.inputs), outputs(small, case.inputs), 1e-9)


def test_integers_for_weights_cope_with_skipped_blocks():
    net = Deep().eval()
    skip_blocks(net, "blocks.1", torch.ones(2, 4))
    small = quantize(copy.deepcopy(net))
    assert_same(outputs(small, torch.ones(2, 4)), outputs(net, torch.ones(2, 4)), 0.05)
    assert isinstance(small.blocks[1], Skipped)


def test_a_cache_of_keys_and_values_works_without_the_first_block():
    torch.manual_seed(0)
    net = gpt2().eval()
    skip_blocks(net, ["transformer.h.0", "transformer.h.2"], {"input_ids": torch.arange(5)[None]})
    again = restore_structure(gpt2(), net.state_dict())
    again.load_state_dict(net.state_dict())
    ids = torch.arange(8)[None]
    with torch.no_grad():
        wanted = net(ids, use_cache=False).logits
        for one in (net, again.eval()):
            cache = one(ids[:, :5], use_cache=True).past_key_values
            assert_same(one(ids[:, 5:], past_key_values=cache).logits, wanted[:, 5:], 1e-5)


def test_what_globs_pass_over_is_told():
    case, _ = grouped("resnet")
    found = find_blocks(case.net, case.inputs, case.blocks, keep="layer1.1.conv1")
    assert [group.block for group in found.groups] == ["layer1.0", "layer2.1"]
    assert "into (2, 128, 4, 4)" in found.refused["layer2.0"]
    assert "`keep` names 'layer1.1.conv1'" in found.refused["layer1.1"]


class Counting(Block):
    """Says how often it was called, to the next block."""

    def forward(self, x, count=None):
        count = torch.zeros(()) if count is None else count
        return super().forward(x * (1 + count)), count + 1


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Counting(4, 6) for _ in range(3))

    def forward(self, x):
        count = None
        for block in self.blocks:
            x, count = block(x, count)
        return x


def test_blocks_that_the_next_one_needs_are_found_among_several():
    found = find_blocks(Counted(), torch.ones(2, 4), "blocks.*")
    assert [group.block for group in found.groups] == ["blocks.2"]
    assert list(found.refused) == ["blocks.0", "blocks.1"]


class InPlace(Block):
    def forward(self, x):
        return super().forward(x.relu_())


def bad_calls():
    x = torch.ones(2, 4)
    nested = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Block(4, 4), Block(4, 4)))
    changing = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
    in_place = nn.Sequential(nn.Linear(4, 4), InPlace(4, 4), nn.Linear(4, 4))
    dense = Deep()
    small = skip_blocks(Deep(), "blocks.1", x).state_dict()
    budget_groups = find_blocks(dense, x, "blocks.*").groups
    budget = Budget(dense, budget_groups, target=0.1)
    ones = [torch.ones(1).bool() for _ in budget_groups]
    return [
        (lambda: skip_blocks(dense, "block.1", x), "`blocks`: no module is called 'block.1'; did you mean 'blocks.1'"),
        (lambda: skip_blocks(dense, "blocks", x), r"'blocks' is a ModuleList.*'blocks.\*' takes all"),
        (
            lambda: skip_blocks(changing, "1", x),
            r"`blocks`: '1' cannot be removed: it turns shape \(2, 4\) into \(2, 8\)",
        ),
        (lambda: skip_blocks(nested, ["1", "1.0"], x), "`blocks`: '1.0' lies inside of '1'"),
        (lambda: skip_blocks(dense, "head", x), "'head' cannot be removed: it is a Linear, and not a block"),
        (lambda: find_blocks(dense, x, "blocks.1", keep="blocks.1.up"), "`keep` names 'blocks.1.up'"),
        (lambda: skip_blocks(in_place, "1", x), "'1' cannot be removed: .* changes its input in place"),
        (lambda: skip_blocks(Counted(), "blocks.0", x), "later layers use what else it returns"),
        (lambda: find_blocks(dense, x, "blocks.*.up"), r"`blocks`: 'blocks.\*.up' must match a residual block"),
        (
            lambda: project(budget, ones, ones),
            "groups and ranks are at their minimum and all blocks are removed, got 0.1",
        ),
        (
            lambda: restore_structure(changing, {"0.weight": torch.ones(4, 4), "0.skipped": torch.ones(())}),
            "'0' is skipped",
        ),
        (lambda: restore_structure(Deep(blocks=1), small), "'blocks.1.skipped' is unknown to the model"),
        (
            lambda: restore_structure(skip_blocks(Deep(), "blocks.1", x), dense.state_dict()),
            "'blocks.1' is there and skipped in the model; start from a fresh model",
        ),
        (
            lambda: restore_structure(Deep(), {**small, "blocks.1.up.weight": torch.ones(8, 6)}),
            "'blocks.1' is skipped there and has 'blocks.1.up.weight' as well",
        ),
        (lambda: Skipped(-1), "`returns` must be 0 for a tensor or the length of a tuple, got -1"),
    ]


@pytest.mark.parametrize("number", range(15))
def test_bad_inputs_are_named(number):
    calls = bad_calls()
    assert len(calls) == 15
    call, message = calls[number]
    with pytest.raises(ValueError, match=message):
        call()
