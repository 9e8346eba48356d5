import copy
import pickle

import pytest
import timm
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from lightning_plugins.compression import factorize, low_rank_layer
from lightning_plugins.compression.low_rank.weight_readers import readers
from tests.models import Classifier


class Conv(nn.Conv2d):
    """Only the name is new."""


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        return nn.functional.conv2d(x, self.weight - self.weight.mean(), self.bias)


class Reader(nn.Module):
    """Reads the attributes of layers in its forward pass and what that calls, and of others elsewhere."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.sized = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.below = nn.ModuleDict({"deep": nn.Linear(8, 8), "called": nn.Linear(8, 8)})
        self.initialised = nn.Linear(8, 8)
        self.reset()

    def reset(self):
        nn.init.zeros_(self.initialised.weight)

    @property
    def dtype(self):
        return self.below["deep"].weight.dtype

    def scale(self):
        return self.sized.out_features

    def forward(self, x):
        x = self.initialised(self.below["called"](self.called(x).to(self.dtype)))
        return self.sized(nn.functional.linear(x, self.read.weight)) * self.scale()


class Mixed(nn.Module):
    """Layers that can be split and layers that cannot, each under its name."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv, self.sequence = nn.Linear(8, 8), nn.Conv2d(8, 8, 3), nn.Conv1d(8, 8, 3)
        self.renamed, self.of_timm = Conv(8, 8, 3), timm.layers.Linear(8, 8)
        self.embedding, self.grouped = nn.Embedding(9, 8), nn.Conv2d(8, 8, 3, groups=2)
        self.transposed, self.lazy = nn.ConvTranspose2d(8, 8, 3), nn.LazyLinear(8)
        self.standardised = StandardisedConv(8, 8, 3)
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        with pytest.warns(FutureWarning):
            self.old_normed = weight_norm(nn.Linear(8, 8))
        self.spectral = parametrizations.spectral_norm(nn.Conv2d(8, 8, 3))
        self.pruned = prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)
        self.hooked = nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda *args: None)
        self.tied, self.tied_too = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied_too.weight = self.tied.weight
        self.attention = nn.MultiheadAttention(8, 2)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 8)
        self.reader = Reader()
        self.small = low_rank_layer(nn.Linear(8, 8), 2)
        self.patched = nn.Linear(8, 8)
        self.patched.forward = lambda x: x
        self.compiled = torch.compile(nn.Linear(8, 8), backend="eager")
        self.whole_numbers = nn.Linear(8, 8)
        self.whole_numbers.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)


SPLIT = {
    "linear",
    "conv",
    "sequence",
    "renamed",
    "of_timm",
    "reader.called",
    "reader.below.called",
    "reader.initialised",
}
REFUSED = {
    "embedding": "is a Embedding, and only Linear, Conv1d and Conv2d",
    "grouped": "2 groups",
    "transposed": "is a ConvTranspose2d",
    "lazy": "lazy.*run a batch",
    "standardised": "StandardisedConv, which may compute in its own way",
    "normed": "computed from others.*remove_parametrizations",
    "old_normed": "computed from others",
    "spectral": "computed from others",
    "pruned": "computed from others",
    "hooked": "hooks.*remove them first",
    "tied": "tied weights.*untie",
    "tied_too": "tied weights",
    "attention": "is a MultiheadAttention",
    "attention.out_proj": "MultiheadAttention reads the weight",
    "encoder.linear1": "`TransformerEncoderLayer.forward` reads its `weight`",
    "encoder.self_attn.out_proj": "reads",
    "reader.read": "`Reader.forward` reads its `weight`",
    "reader.sized": "`Reader.scale` reads its `out_features`",
    "reader.below.deep": "`Reader.dtype` reads its `weight`",
    "small": "is a Sequential; name a layer in it",
    "small.0": "already a factor of a low-rank layer",
    "small.1": "already a factor of a low-rank layer",
    "patched": "may compute in its own way",
    "compiled": "compiled on its own",
    "whole_numbers": "int8.*before quantising",
}


KINDS = {nn.Linear, nn.Conv1d, nn.Conv2d}


def pairs(model):
    """The names of what has become a sequence."""
    return {
        name
        for name, module in model.named_modules()
        if name and type(module) is nn.Sequential and len(module) == 2 and {type(half) for half in module} <= KINDS
    }


def test_globs_split_what_can_be_split():
    model = Mixed()
    before = {name: id(module) for name, module in model.named_modules()}
    assert factorize(model, 2) is model
    assert pairs(model) == SPLIT | {"small"}
    kept = {name: id(module) for name, module in model.named_modules() if not name.startswith(tuple(SPLIT))}
    assert kept.items() <= before.items()


@pytest.mark.parametrize("name", sorted(SPLIT))
def test_layers_that_are_named_are_split(name):
    assert pairs(factorize(Mixed(), 2, name)) == {name, "small"}


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_layers_that_are_named_and_cannot_be_split_are_refused(name, reason):
    model = Mixed()
    for arguments in ((2, name), ({name: 2},), (2, ["linear", name])):
        with pytest.raises(ValueError, match=f"`layers`: '{name}' must.*{reason}"):
            factorize(model, *arguments)
    assert pairs(model) == {"small"}


def test_methods_that_a_forward_pass_does_not_reach_do_not_count():
    reader = Reader()
    assert set(readers(reader)) == {reader.read, reader.sized, reader.below["deep"]}
    x = torch.randn(3, 8)
    torch.testing.assert_close(factorize(copy.deepcopy(reader), 1.0, only_if_smaller=False)(x), reader(x))


def test_whatever_a_module_without_source_reads_is_not_looked_up():
    scope = {"nn": nn}
    exec("class Typed(nn.Module):\n    def forward(self, x):\n        return self.a.weight", scope)
    typed = scope["Typed"]()
    typed.a = nn.Linear(2, 2)
    assert readers(typed) == {}


def test_a_call_of_the_base_class_is_followed():
    class Below(Reader):
        def forward(self, x):
            return super().forward(x)

    class Beside(Reader):
        def forward(self, x):
            return self.called(x)

    below, beside = Below(), Beside()
    assert below.read in readers(below)
    assert readers(beside) == {}


def test_encoder_layer_still_runs_in_both_modes():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    model = nn.Sequential(nn.Linear(8, 8), encoder)
    x = torch.randn(2, 5, 8)
    expected = copy.deepcopy(model).eval()(x)
    factorize(model, 8, only_if_smaller=False)
    assert pairs(model) == {"0"}
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected, rtol=0, atol=1e-5)
    model.train()(x).sum().backward()


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (1.0, [9, 6]),
        (0.5, [5, 3]),  # 4.5 is rounded up
        (0.01, [1, 1]),
        (3, [3, 3]),
        (100, [9, 6]),
        ({"1": 4}, [None, 4]),
        ({"0": 9, "1": 1}, [9, 1]),
        ({}, [None, None]),
    ],
)
def test_ranks_are_fractions_ints_or_by_name(ranks, expected):
    net = nn.Sequential(nn.Linear(9, 12), nn.Linear(12, 6))
    factorize(net, ranks, only_if_smaller=False)
    assert [layer[0].out_features if isinstance(layer, nn.Sequential) else None for layer in net] == expected


def test_layers_that_would_not_become_smaller_stay():
    net = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 4))
    factorize(net, 3)  # 3 x 24 < 144, and 3 x 16 = 48 is no less than 48
    assert pairs(net) == {"0"}
    factorize(net, {"1": 3})
    assert pairs(net) == {"0"}
    factorize(net, {"1": 2})
    assert pairs(net) == {"0", "1"}


def test_a_second_time_changes_nothing():
    net = factorize(nn.Sequential(nn.Linear(12, 12), nn.Conv2d(3, 9, 3)), 2)
    modules = [id(module) for module in net.modules()]
    with pytest.raises(ValueError, match="already a factor of a low-rank layer"):
        factorize(net, 1)
    assert [id(module) for module in net.modules()] == modules


def test_shared_module_is_split_once_and_stays_shared():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.list = nn.ModuleList([self.a, nn.Tanh(), self.a])

        def forward(self, x):
            for layer in self.list:
                x = layer(x)
            return self.a(x)

    net, x = Twice().double(), torch.randn(2, 8, dtype=torch.float64)
    expected = net(x)
    factorize(net, {"a": 8, "list.2": 8}, only_if_smaller=False)
    assert net.a is net.list[0] is net.list[2]
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match=r"one rank, got 7 and 8 for 'list\.0'"):
        factorize(Twice(), {"a": 7, "list.0": 8})


def test_lightning_module_computes_the_same_at_full_rank_and_trains():
    model = Classifier().double()
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = model(x)
    factorize(model, 1.0, only_if_smaller=False)
    assert isinstance(model, LightningModule)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)
    assert {name for name, _ in model.named_parameters()} >= {"head.0.weight", "head.1.weight", "head.1.bias"}
    optimizer = model.configure_optimizers()
    model.loss((x, torch.tensor([0, 1, 2, 0]))).backward()
    optimizer.step()
    assert not torch.equal(model(x), expected)


def test_wrappers_stay():
    net = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), backend="eager")
    x = torch.randn(2, 8)
    expected = net(x)
    factorize(net, {"0": 8}, only_if_smaller=False)
    assert isinstance(net, torch._dynamo.OptimizedModule)
    assert isinstance(net._orig_mod[0], nn.Sequential)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", [1, 2])
def test_small_network_copies_pickles_and_exports(scheme):
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 9)
    )
    small, x = factorize(net.eval(), 0.25, scheme=scheme), torch.randn(2, 3, 8, 8)
    expected = small(x)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), torch.export.export(small, (x,)).module()):
        torch.testing.assert_close(other(x), expected)


def test_nothing_is_changed_if_one_layer_cannot_be_split():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'1' cannot be split.*finite"):
        factorize(net, 2)
    assert pairs(net) == set()


NET = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Conv2d(3, 8, 3))
BAD = [
    ((0.0,), {}, ValueError, r"`ranks` must be in \(0, 1\] as a fraction"),
    ((-0.5,), {}, ValueError, "`ranks` must be in"),
    ((float("nan"),), {}, ValueError, "`ranks` must be in"),
    ((8.0,), {}, ValueError, "did you mean the int 8"),
    ((0,), {}, ValueError, "`ranks` must be at least 1, got 0"),
    ((True,), {}, TypeError, "`ranks` must be a fraction"),
    (("0.5",), {}, TypeError, "`ranks` must be a fraction.*'0.5'"),
    (([2, 3],), {}, TypeError, "`ranks` must be a fraction"),
    (({"0": 9},), {}, ValueError, r"`ranks\['0'\]` must be from 1 to 8, the layer's full rank, got 9"),
    (({"0": 0},), {}, ValueError, r"`ranks\['0'\]` must be at least 1"),
    (({"0": 0.5},), {}, TypeError, r"`ranks\['0'\]` must be an int"),
    (({0: 2},), {}, TypeError, "`ranks` must map names of layers to ints, got the name 0"),
    (({"*": 2},), {}, ValueError, "exactly, got the glob"),
    (({"00": 2},), {}, ValueError, "no module is called '00'; did you mean '0'"),
    (({"0": 2}, "2"), {}, ValueError, "`ranks` names '0', which `layers='2'` does not match"),
    ((2, "1"), {}, ValueError, "'1' must be a layer.*ReLU"),
    ((2, "1*"), {}, ValueError, "must match linear layers or convolutions.*'1' is a ReLU"),
    ((2, "3"), {}, ValueError, "no module is called '3'"),
    ((2, []), {}, ValueError, "`layers` must be"),
    ((2, "0:input"), {}, ValueError, "not its input"),
    ((2, "2"), {"scheme": 3}, ValueError, "`scheme` must be 1 or 2, got 3"),
]


@pytest.mark.parametrize(("args", "settings", "error", "message"), BAD)
def test_mistakes_are_named(args, settings, error, message):
    with pytest.raises(error, match=message):
        factorize(NET, *args, **settings)
    assert pairs(NET) == set()


def test_a_single_layer_has_no_place_to_be_exchanged_in():
    with pytest.raises(ValueError, match="no module is called"):
        factorize(nn.Linear(3, 3), 1)
