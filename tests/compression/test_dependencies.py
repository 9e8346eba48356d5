"""Bundles: each channel of a layer with all the others that have to leave together with it."""

import itertools

import pytest
import torch
from torch import nn
from torch_pruning.dependency import Dependency

from lightning_plugins.compression.channels.dependencies import Place, bundles, parameters_of


@pytest.fixture(autouse=True)
def circles_are_noticed(monkeypatch):
    """A walk that does not come to an end fails, and does not hang."""
    asked, follows = itertools.count(), Dependency.is_triggered_by

    def counted(dependency, handler):
        assert next(asked) < 2000
        return follows(dependency, handler)

    monkeypatch.setattr(Dependency, "is_triggered_by", counted)


class Joined(nn.Module):
    """Two layers of two channels, side by side in what a third one takes, or added to one another."""

    def __init__(self, *, added: bool) -> None:
        super().__init__()
        self.added = added
        self.one, self.two = nn.Linear(4, 2), nn.Linear(4, 2)
        self.last = nn.Linear(2 if added else 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.one(x), self.two(x)
        return self.last(one + two if self.added else torch.cat([one, two], 1))


def removable(model: nn.Module, inputs: torch.Tensor) -> list[set[Place]]:
    return [set(bundle.places) for bundle in bundles(model.eval(), inputs) if not bundle.reason]


def test_a_channel_goes_with_the_column_that_reads_it():
    net = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3))
    found = [(set(places), reason, attention) for places, reason, attention in bundles(net.eval(), torch.randn(5, 4))]
    assert found == [
        *(({Place("0", "out", i), Place("2", "in", i)}, "", "") for i in range(2)),
        *(({Place("2", "out", i)}, "it reaches the model's output", "") for i in range(3)),
    ]


def test_channels_that_are_added_leave_together_and_those_side_by_side_apart():
    inputs = torch.randn(5, 4)
    assert removable(Joined(added=True), inputs) == [
        {Place("one", "out", i), Place("two", "out", i), Place("last", "in", i)} for i in range(2)
    ]
    assert removable(Joined(added=False), inputs) == [
        *({Place("one", "out", i), Place("last", "in", i)} for i in range(2)),
        *({Place("two", "out", i), Place("last", "in", 2 + i)} for i in range(2)),
    ]


def test_channels_at_the_same_position_of_every_group_leave_together():
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1, groups=2), nn.Conv2d(4, 2, 1))
    first = [
        {Place(*place, i) for i in (j, j + 3) for place in (("0", "out"), ("1", "norm"), ("2", "in"))} for j in range(3)
    ]
    second = [{Place(*place, i) for i in (j, j + 2) for place in (("2", "out"), ("3", "in"))} for j in range(2)]
    assert removable(net, torch.randn(2, 3, 4, 4)) == [*first, *second]


def test_which_tensors_hold_a_side_of_a_layer():
    net = nn.ModuleDict({"conv": nn.Conv2d(3, 6, 1), "up": nn.ConvTranspose2d(6, 4, 2), "norm": nn.BatchNorm1d(4)})
    assert list(parameters_of(net, "conv", "out")) == [("conv.weight", 0, "out"), ("conv.bias", 0, "out")]
    assert list(parameters_of(net, "conv", "in")) == [("conv.weight", 1, "in")]
    assert list(parameters_of(net, "up", "out")) == [("up.weight", 1, "out"), ("up.bias", 0, "out")]
    assert list(parameters_of(net, "up", "in")) == [("up.weight", 0, "in")]
    assert list(parameters_of(net, "norm", "norm")) == [
        ("norm.weight", 0, "norm"),
        ("norm.bias", 0, "norm"),
        ("norm.running_mean", 0, "buffer"),
        ("norm.running_var", 0, "buffer"),
    ]
