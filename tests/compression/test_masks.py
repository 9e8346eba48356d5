"""Masks as parametrizations: exact when hard, gone without a trace, with gradients of finite differences."""

import copy

import pytest
import torch
from torch import nn

from lightning_plugins.compression import apply_masks, bake_masks, channel_groups, masks_of, remove_masks, shrink
from tests.compression.networks import NETWORKS, build, draw_kept


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_hard_masks_compute_what_the_smaller_network_computes(name, training):
    net, x = build(name)
    groups = channel_groups(net, x)
    kept = draw_kept(groups)
    masks = apply_masks(net, groups)
    masks.set_kept(kept)
    net.train(training)
    masked = net(x)
    bake_masks(net)
    torch.testing.assert_close(net(x), masked)
    shrink(net, groups, kept)
    torch.testing.assert_close(net(x), masked, rtol=1e-10, atol=1e-10)
    assert sum(keep.sum() for keep in kept) < sum(len(keep) for keep in kept)


@pytest.mark.parametrize("name", NETWORKS)
def test_removing_restores_the_module_exactly(name):
    net, x = build(name)
    before, ids = copy.deepcopy(net.state_dict()), [id(parameter) for parameter in net.parameters()]
    types, attributes = [type(m) for m in net.modules()], [set(vars(m)) for m in net.modules()]
    expected = net(x)
    apply_masks(net, channel_groups(net, x))
    twin = copy.deepcopy(net)
    remove_masks(twin)  # a copy shares torch's generated classes with the original
    torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    assert masks_of(net) is not None
    net(x)
    remove_masks(net)
    assert [id(parameter) for parameter in net.parameters()] == ids
    assert list(net.state_dict()) == list(before)
    assert [type(m) for m in net.modules()] == types
    assert [set(vars(m)) for m in net.modules()] == attributes
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)


def test_every_score_is_one_parameter():
    net, x = build("residual")
    plain = [name for name, _ in net.named_parameters()]
    groups = channel_groups(net, x)
    apply_masks(net, groups)
    names = [name for name, _ in net.named_parameters(remove_duplicate=False)]
    assert [name for name in names if "score" in name] == [f"channel_masks.scores.{i}" for i in range(3)]
    assert len(names) == len(plain) + 3
    assert sum("score" in key for key in net.state_dict()) == 3


@pytest.mark.parametrize("gate", ["sigmoid", "hard_concrete"])
def test_the_gradient_of_the_scores_is_that_of_finite_differences(gate):
    net, x = build("branches")
    masks = apply_masks(net, channel_groups(net, x), beta=1.5, gate=gate, init=0.3)
    masks.draw(torch.Generator().manual_seed(0))
    for parameter in masks.scores:
        parameter.data += torch.linspace(-0.4, 0.4, len(parameter), dtype=torch.float64)
    net(x).square().sum().backward()
    for parameter in masks.scores:
        for i in (0, len(parameter) - 1):
            values = []
            for step in (1e-6, -1e-6):
                parameter.data[i] += step
                values.append(net(x).square().sum().item())
                parameter.data[i] -= step
            numeric = (values[0] - values[1]) / 2e-6
            assert parameter.grad[i].item() == pytest.approx(numeric, rel=1e-4, abs=1e-7)


def test_straight_through_masks_are_hard_and_learn():
    net, x = build("residual")
    masks = apply_masks(net, channel_groups(net, x), gate="straight_through", init=0.1)
    masks.scores[1].data[:5] = -0.1
    soft = net(x)
    soft.sum().backward()
    assert masks.values()[1].tolist() == [0.0] * 5 + [1.0] * 11
    assert masks.scores[1].grad.abs().sum() > 0
    masks.set_hard()
    torch.testing.assert_close(net(x), soft)


def test_masks_load_from_a_state_dict_and_anneal():
    net, x = build("transformer")
    groups = channel_groups(net, x)
    masks = apply_masks(net, groups)
    masks.set_beta(50.0)
    torch.testing.assert_close(masks.values()[0], torch.sigmoid(50 * masks.scores[0]))
    masks.set_kept(draw_kept(groups))
    twin, _ = build("transformer", seed=1)
    apply_masks(twin, groups)
    twin.load_state_dict(net.state_dict())
    torch.testing.assert_close(twin(x), net(x), rtol=0, atol=0)


def test_a_score_of_exactly_zero_keeps_no_unit():
    net, x = build("residual")
    groups = channel_groups(net, x)
    masks = apply_masks(net, groups, init=0.0)
    assert not any(keep.any() for keep in masks.kept())
    masks.set_hard()
    assert not any(mask.any() for mask in masks.values())
    masks.set_kept([torch.ones(group.size, dtype=torch.bool) for group in groups])  # and can be decided for it
    assert all(keep.all() for keep in masks.kept())
    assert all((mask == 1).all() for mask in masks.values())


def test_baking_keeps_the_parameter_objects():
    net, x = build("residual")
    ids = [id(parameter) for parameter in net.parameters()]
    groups = channel_groups(net, x)
    apply_masks(net, groups).set_kept(draw_kept(groups))
    bake_masks(net)
    assert [id(parameter) for parameter in net.parameters()] == ids


def bad_calls():
    net, x = build("residual")
    groups = channel_groups(net, x)
    masked, _ = build("residual")
    masks = apply_masks(masked, groups)
    kept = [torch.ones(group.size, dtype=torch.bool) for group in groups]
    return [
        (lambda: apply_masks(masked, groups), "`model` must have no masks yet"),
        (lambda: apply_masks(net, []), "`groups` must hold at least one group"),
        (lambda: apply_masks(nn.Sequential(nn.Linear(2, 2)), groups), "`groups` must be those of this model"),
        (lambda: apply_masks(net, groups, beta=0), "`beta` must be positive"),
        (lambda: apply_masks(net, groups, gate="sigmoidal"), "did you mean 'sigmoid'"),
        (lambda: apply_masks(net, groups, init=float("nan")), "`init`"),
        (lambda: masks.set_beta(-1), "`beta` must be positive"),
        (lambda: masks.set_kept(kept[:-1]), "`kept` must have one mask for each of the 3 groups"),
        (lambda: masks.set_kept([keep.float() for keep in kept]), "`kept` must hold a boolean tensor"),
        (lambda: shrink(net, groups, [kept[0] & False, *kept[1:]]), "`kept` must leave at least one unit"),
        (lambda: shrink(build("branches")[0], groups, kept), "`groups` must be those of this model"),
        (lambda: remove_masks(net), "`model` must have masks to remove"),
        (lambda: bake_masks(net), "`model` must have masks to remove"),
    ]


@pytest.mark.parametrize("index", range(13))
def test_bad_inputs_are_named(index):
    call, message = bad_calls()[index]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_masks_stand_in_a_sequential_and_leave_other_parametrizations():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(2, 4)
    groups = channel_groups(net, x)
    nn.utils.parametrize.register_parametrization(net[2], "weight", nn.Softsign())
    expected = net(x)
    masks = apply_masks(net, groups)
    assert net(x).shape == (2, 3)
    masks.set_hard()
    torch.testing.assert_close(net(x), expected)
    remove_masks(net)
    assert isinstance(net[2].parametrizations["weight"][0], nn.Softsign)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)
