"""Layers are found by name, glob and type, through wrappers, and what is not found is answered with what is near."""

import time
from collections import OrderedDict
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrizations import orthogonal

from lightning_plugins.selection import TensorRef, check_layers, select_modules, select_tensors, split_side


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(1, 2, 3), act=nn.ReLU(), fc=nn.Linear(4, 4), blocks=nn.ModuleList([nn.Tanh()]))
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.backbone.fc(x))


NAMES = ["backbone", "backbone.conv", "backbone.act", "backbone.fc", "backbone.blocks", "backbone.blocks.0", "head"]


@pytest.fixture
def net():
    return Net()


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("a.b", ("a.b", "output")),
        ("a.b:input", ("a.b", "input")),
        ("a.b:output", ("a.b", "output")),
        ("*:input", ("*", "input")),
        ("odd:name:output", ("odd:name", "output")),
    ],
)
def test_split_side(layer, expected):
    assert split_side(layer) == expected


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        ("fc:in", r"`layers`: 'input' or 'output' must follow ':', got 'fc:in'; did you mean 'fc:input'\?"),
        ("fc:OUTPUT", r"got 'fc:OUTPUT'; did you mean 'fc:output'\?"),
        ("fc:", r"got 'fc:'$"),
        ("fc:zzz", r"got 'fc:zzz'$"),
    ],
)
def test_a_wrong_side_is_named(layer, match):
    with pytest.raises(ValueError, match=match):
        split_side(layer)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("head", ["head"]),
        ("*", NAMES),
        ("backbone*", NAMES[:-1]),
        ("backbone.*", NAMES[1:-1]),
        ("*.[af]c*", ["backbone.act", "backbone.fc"]),
        ("*.f?", ["backbone.fc"]),
        (["head", "backbone.conv"], ["backbone.conv", "head"]),
        (("head", "h*", "head"), ["head"]),
    ],
)
def test_names_and_globs_in_the_models_order(net, layers, expected):
    found = select_modules(net, layers)
    assert list(found) == expected
    assert all(found[name] is net.get_submodule(name) for name in expected)


def test_types_pass_over_other_modules_of_a_glob(net):
    assert list(select_modules(net, "*", types=[nn.Linear])) == ["backbone.fc", "head"]
    assert list(select_modules(net, "*", types=(nn.Linear, nn.Conv2d))) == ["backbone.conv", "backbone.fc", "head"]


@pytest.mark.parametrize(
    ("layers", "types", "match"),
    [
        ("backbone.fcc", None, r"`layers`: no module is called 'backbone\.fcc'; did you mean 'backbone\.fc'"),
        ("hed", None, r"no module is called 'hed'; did you mean 'head'\?"),
        ("Head", None, r"no module is called 'Head'; did you mean 'head'\?"),
        ("zzz", None, r"is called 'zzz'; it has backbone, backbone\.conv, backbone\.act, …, .*, head \(7 modules\)"),
        ("bacbone.*", None, r"no module is called 'bacbone\.\*'; did you mean 'backbone"),
        (["head", "nope*"], None, r"no module is called 'nope\*'"),
        ("backbone.act", [nn.Linear], r"'backbone\.act' must match modules of the types Linear, got ReLU"),
        ("backbone.b*", [nn.Linear, nn.Conv2d], r"of the types Conv2d, Linear, got ModuleList, Tanh"),
        (["*", "*act"], [nn.Linear], r"'\*act' must match modules of the types Linear, got ReLU"),
        ("head:input", None, r"`layers` takes the weights of a layer here, not its input or output: got 'head:input'"),
        ("", None, r"got '', which would be the whole model; name one of its layers"),
        ([], None, r"must be a module name, a glob, or a list of them, got an empty list; '\*' takes every layer"),
    ],
)
def test_what_is_not_found_is_answered_with_what_is_near(net, layers, types, match):
    with pytest.raises(ValueError, match=match):
        select_modules(net, layers, types=types)


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        (None, r"`layers` must be a module name, a glob, or a list of them, got NoneType"),
        (3, r"got int"),
        ({"head"}, r"got set"),
        (["head", 3], r"got one with 3 \(int\) in it"),
        (b"head", r"got one with 104 \(int\) in it"),
    ],
)
@pytest.mark.parametrize("select", [select_modules, select_tensors, lambda _, ls: check_layers(ls)])
def test_layers_of_a_wrong_type(net, select, layers, match):
    with pytest.raises(TypeError, match=match):
        select(net, layers)


def test_an_empty_model_has_nothing_to_choose():
    with pytest.raises(ValueError, match=r"no module is called '\*'; it has no module"):
        select_modules(nn.ReLU(), "*")


def test_check_layers_needs_no_model():
    assert check_layers("a", sides=False) == ("a",)
    assert check_layers(["a:input", "b"]) == ("a:input", "b")
    with pytest.raises(ValueError, match="whole model"):
        check_layers(":input")
    with pytest.raises(ValueError, match="must follow ':'"):
        check_layers(["a", "b:inputs"])


def test_tensors_in_the_models_order_once_each(net):
    refs = select_tensors(net, ["head", "h*:input", "head:output", "backbone.fc:input"])
    assert [(ref.name, ref.side, ref.label) for ref in refs] == [
        ("backbone.fc", "input", "backbone.fc:input"),
        ("head", "input", "head:input"),
        ("head", "output", "head"),
    ]
    assert refs[0] == TensorRef("backbone.fc", net.backbone.fc, "input")


def test_tensors_of_modules_that_are_never_called_are_passed_over_or_refused(net):
    assert [ref.name for ref in select_tensors(net, "*.bl*")] == ["backbone.blocks.0"]
    match = r"'backbone\.blocks' must match modules that a forward pass calls, got ModuleList; in it are .*blocks\.0$"
    with pytest.raises(ValueError, match=match):
        select_tensors(net, "backbone.blocks:input")


def test_globs_take_layers_and_not_their_parametrizations(net):
    orthogonal(net.head)
    assert [ref.name for ref in select_tensors(net, "head*")] == ["head"]
    named = "head.parametrizations.weight.0"
    assert [ref.name for ref in select_tensors(net, named)] == [named]


def test_a_shared_module_is_there_once_and_answers_to_every_name(net):
    net.tied = net.head
    assert list(select_modules(net, "*", types=[nn.Linear])) == ["backbone.fc", "head"]
    assert list(select_modules(net, "tied")) == ["tied"]
    assert list(select_modules(net, ["tied", "head"])) == ["head"]
    assert [ref.name for ref in select_tensors(net, ["tied", "tied:input", "head"])] == ["head", "tied"]


def test_a_name_with_brackets_is_found_before_globs():
    net = nn.ModuleDict({"a[b]": nn.ReLU(), "ab": nn.Tanh()})
    assert list(select_modules(net, "a[b]")) == ["a[b]"]


@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), checkpoint_wrapper])
def test_wrappers_are_transparent(net, wrap):
    plain = net.backbone
    net.backbone = wrap(plain)
    wrapper = net.backbone
    assert list(select_modules(net, "*")) == NAMES
    assert select_modules(net, "backbone")["backbone"] is plain
    assert select_modules(net, "backbone.fc", types=[nn.Linear]) == {"backbone.fc": plain.fc}
    assert select_tensors(net, "backbone") == [("backbone", wrapper, "output")]
    assert select_tensors(net, "backbone.fc") == [("backbone.fc", plain.fc, "output")]
    raw = next(name for name, module in net.named_modules() if module is plain.fc)
    assert raw != "backbone.fc"
    assert list(select_modules(net, raw)) == ["backbone.fc"]


def test_a_compiled_root_is_transparent(net):
    assert list(select_modules(torch.compile(net, backend="eager"), "*")) == NAMES


def test_thousands_of_modules_take_little_time():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict({f"m{i}": nn.Identity() for i in range(49)})

    big = nn.ModuleList([Block() for _ in range(100)])
    names = [name for name, module in big.named_modules() if isinstance(module, nn.Identity)]
    start = time.perf_counter()
    assert list(select_modules(big, names)) == names
    assert len(select_tensors(big, ["*:input", "*.m1"])) == 100 * 49 + 100  # a block has no forward
    with pytest.raises(ValueError, match=r"did you mean '7\.layers\.m4'"):
        select_modules(big, "7.layer.m4")
    assert time.perf_counter() - start < 5  # well below a second on an idle machine
