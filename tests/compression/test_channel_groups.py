"""Groups of channels: which tensors they run through, what stays whole, and that they survive a checkpoint."""

import io
import sys

import pytest
import torch
from timm.layers import RmsNorm2d, RmsNormAct2d
from timm.layers.lambda_layer import LambdaLayer
from torch import nn

from lightning_plugins.compression import channel_groups, find_channel_groups, groups_from_state, groups_to_state
from tests.compression.networks import NETWORKS, Residual, build


def slices(group, side):
    return {(member.parameter, member.dim) for member in group.members if member.side == side}


def test_residual_sums_and_depthwise_layers_share_a_group():
    net, x = build("residual")
    stream, first, second = channel_groups(net, x)
    assert (stream.name, stream.size, stream.layers) == ("stem.0", 12, ("stem.0", "blocks.0.6", "blocks.1.6"))
    assert slices(stream, "in") == {("blocks.0.0.weight", 1), ("blocks.1.0.weight", 1), ("head.weight", 1)}
    assert first.layers == ("blocks.0.0", "blocks.0.3")
    assert second.name == "blocks.1.0"
    assert ("blocks.0.5.weight", 0) in slices(first, "norm")  # the slopes of a PReLU
    assert ("stem.1.running_var", 0) in slices(stream, "buffer")


def test_a_flatten_gives_every_channel_as_many_columns_as_places():
    net, x = build("residual")
    (columns,) = [member.units for member in channel_groups(net, x)[0].members if member.parameter == "head.weight"]
    assert columns == tuple(channel for channel in range(12) for _ in range(4))


def test_concatenation_groups_and_halves():
    net, x = build("branches")
    groups = {group.name: group for group in channel_groups(net, x)}
    assert list(groups) == ["left", "left~2", "grouped", "last"]
    # 20 channels in four groups of the convolution: those at the same of five positions go together.
    assert groups["left"].size + groups["left~2"].size == 5
    owner = dict.fromkeys(range(5))
    for group in (groups["left"], groups["left~2"]):
        for member in group.members:
            if member.parameter == "grouped.weight":
                owner.update({place: group.name for place, unit in enumerate(member.units) if unit >= 0})
    assert None not in owner.values()
    # Channel j of the first half is multiplied with channel j of the second, and each half lies in two groups.
    assert groups["grouped"].size == 4
    assert [g.gate_inputs for g in groups.values()] == [True, True, False, True]  # sigmoid, and softplus, of 0 is not 0


def test_heads_are_the_units_of_an_attention():
    net, x = build("transformer")
    groups = {group.name: group for group in channel_groups(net, x)}
    head = groups["attention.0.qkv"]
    assert (head.size, head.attention) == (4, "attention.0")
    rows = next(member.units for member in head.members if member.parameter == "attention.0.qkv.weight")
    assert rows == tuple(i % 16 // 4 for i in range(48))
    assert set(groups) == {"attention.0.qkv", "attention.1.qkv", "up.0", "up.1"}


def test_what_stays_whole_has_a_reason():
    net, x = build("transformer")
    refused = find_channel_groups(net, x).refused
    assert refused["head"] == "it reaches the model's output"
    assert "statistics are taken over channels" in refused["embed"]


def test_keep_and_layers_choose():
    net, x = build("residual")
    assert [group.name for group in channel_groups(net, x, "blocks.*", keep="blocks.1.*")] == ["blocks.0.0"]
    refused = find_channel_groups(net, x, keep="blocks.1.6").refused
    assert refused["stem.0"] == "its channels are also those of 'blocks.1.6', which is kept whole"


class Rolled(nn.Module):
    """Channels are mixed in a way that no graph of layers shows."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.one(x))
        return self.two(x + x.roll(1, 1) + x.softmax(1))


def test_a_wrong_dependency_is_found_by_trying():
    refused = find_channel_groups(Rolled(), torch.randn(2, 4)).refused
    assert "is not the same as masking" in refused["one"]
    with pytest.raises(ValueError, match="`layers`: '\\*' must match a layer that can lose channels"):
        channel_groups(Rolled(), torch.randn(2, 4))


@pytest.mark.parametrize("norm", [RmsNormAct2d, RmsNorm2d])
def test_norms_of_other_classes_over_channels_keep_them(norm):
    net = nn.Sequential(nn.Conv2d(3, 8, 1), norm(8), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    search = find_channel_groups(net, torch.randn(1, 3, 6, 6))
    assert [group.name for group in search.groups] == ["2"]
    assert search.refused["0"] == "it passes '1', whose statistics are taken over channels"


@pytest.mark.parametrize("heads", [16, 1])
def test_reshapes_in_a_circle_come_to_an_end(heads):
    # Torch-Pruning's graph multiplies the channels in every turn for one number of heads, and divides by 0 for another.
    attention = LambdaLayer(16, dim_head=16 // heads, num_heads=heads, r=3)
    net = nn.Sequential(nn.Conv2d(3, 16, 1), attention, nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    search = find_channel_groups(net, torch.randn(1, 3, 6, 6))
    assert [(group.name, group.size) for group in search.groups] == [("2", 8)]
    assert "reshape" in search.refused["1.qkv"]


def test_tied_weights_and_computed_weights_stay_whole():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    net[2].weight = net[0].weight
    assert "is a parameter of several layers" in find_channel_groups(net, torch.randn(1, 4)).refused["0"]
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2))
    assert "computed from other parameters" in find_channel_groups(normed, torch.randn(1, 4)).refused["0"]


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_are_the_same_again_and_load_without_pickled_classes(name):
    net, x = build(name)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    groups = channel_groups(net.train(), x)
    assert net.training
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert channel_groups(build(name, seed=1)[0], x) == groups
    file = io.BytesIO()
    torch.save(groups_to_state(groups), file)
    file.seek(0)
    assert groups_from_state(torch.load(file, weights_only=True)) == groups


def test_frozen_parameters_and_dict_inputs():
    net = Residual().requires_grad_(False)
    assert len(channel_groups(net, {"x": torch.randn(1, 3, 8, 8)})) == 3
    assert not any(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "blcks.*"}, "`layers`: no module is called 'blcks.\\*'"),
        ({"layers": []}, "`layers` must be"),
        ({"keep": "stem.1"}, "`keep`: 'stem.1' must match modules of the types"),
        ({"example_inputs": [torch.zeros(1)]}, "`example_inputs`"),
        ({"example_inputs": None}, "`example_inputs`"),
    ],
)
def test_bad_inputs_are_named(arguments, message):
    net, x = build("residual")
    with pytest.raises((TypeError, ValueError), match=message):
        channel_groups(net, **{"example_inputs": x, **arguments})


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"lightning-plugins\[pruning\]"):
        channel_groups(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), torch.zeros(1, 2))


def test_a_model_that_cannot_be_followed_is_named(monkeypatch):
    import torch_pruning

    def fail(self, *_, **__):
        raise TypeError("unsupported operand")

    monkeypatch.setattr(torch_pruning.DependencyGraph, "build_dependency", fail)
    with pytest.raises(ValueError, match=r"cannot follow the channels of this Sequential \(TypeError.*RankScheduling"):
        channel_groups(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), torch.zeros(1, 3, 4, 4))
    with pytest.raises(RuntimeError, match="expected input"):  # the model's own error
        channel_groups(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), torch.zeros(1, 5, 4, 4))
