"""Replaying what two runs have in common gives what computing it gives, bit for bit, in networks that set traps."""

import weakref
from collections import Counter

import pytest
import timm
import torch
from torch import nn

from lightning_plugins.compression.low_rank.splittable import select_layers
from lightning_plugins.compression.networks.evaluation import evaluation
from lightning_plugins.compression.rank_search.prefix_reuse import PrefixReuse
from lightning_plugins.compression.rank_search.truncation import TruncatedWeights


class Residual(nn.Module):
    """Adds in place to what a norm gave, after which the shortcut is still to come."""

    def __init__(self, width=6, out=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1), nn.BatchNorm2d(out)
        self.act, self.down = nn.ReLU(inplace=True), nn.Conv2d(width, out, 1)

    def forward(self, x):
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        y += 1
        y.mul_(2)
        y += self.down(x)
        return self.act(y)


class Alias(nn.Module):
    """Uses a tensor after a module changed it in place."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.ELU(inplace=True)

    def forward(self, x):
        y = self.one(x)
        self.act(y)
        return self.two(y) + y


class PassedOn(nn.Module):
    """Hands a tensor on through modules that give what they get, and then changes it in place."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU(inplace=True)
        self.drop, self.same = nn.Dropout(), nn.Sequential(nn.Identity(), nn.Identity())

    def forward(self, x):
        a = self.one(x)
        early = a * 2
        b = self.same(self.drop(a))
        self.act(b[1:])
        c = self.two(a)
        return a + b + self.two(self.act(c)) + c + early


class Shared(nn.Module):
    """Calls one layer at two places, and the other way round for the second view."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        first = self.c(self.a(self.b(self.a(x))).tanh())
        return first + self.b(self.a(-x))


class Containers(nn.Module):
    """Passes tensors in a list that grows, and in a dict."""

    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, state):
            return {"x": self.fc(state["x"]).tanh(), "all": [*state["all"], state["x"]], "n": state["n"] + 1}

    class Start(nn.Module):
        def forward(self, x):
            return [x]

    def __init__(self):
        super().__init__()
        self.start = self.Start()
        self.stages = nn.ModuleList(self.Stage() for _ in range(3))

    def forward(self, x):
        grown = self.start(x)
        state = {"x": x, "all": grown, "n": 0}
        for stage in self.stages:
            state = stage(state)
            grown.append(state["x"])
        return torch.stack([*state["all"], *grown]).sum(0) * state["n"]


class Opaque(nn.Module):
    """Gives an object that could change unseen."""

    class Box:
        def __init__(self, x):
            self.x = x

    class Boxed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            return Opaque.Box(self.fc(x))

    def __init__(self):
        super().__init__()
        self.boxed, self.last = self.Boxed(), nn.Linear(6, 6)

    def forward(self, x):
        box = self.boxed(x)
        box.x = box.x + 1
        return self.last(box.x)


class Inference(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.act, self.two = nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6)

    def forward(self, x):
        with torch.inference_mode():
            y = self.one(x)
            y += 1
            return self.two(self.act(y)) + y


def _mlp():
    return nn.Sequential(
        nn.Linear(6, 7), nn.ReLU(), nn.Sequential(nn.Linear(7, 7), nn.ReLU(inplace=True)), nn.Linear(7, 5)
    )


def _all_compiled():
    net = _mlp()
    net.compile(backend="eager")
    return net


def _compiled_inside():
    net = _mlp()
    net[2] = torch.compile(net[2], backend="eager")
    return net


def _compiled_itself():
    net = _mlp()
    net[2].compile(backend="eager")
    return net


def _scripted_inside():
    net = _mlp()
    return nn.Sequential(torch.jit.script(net[:2]), net[2], net[3])


ROW, IMAGE = (4, 6), (2, 6, 5, 5)
NETWORKS = {
    "mlp": (_mlp, ROW),
    "residual": (lambda: nn.Sequential(Residual(), Residual(8, 6)), IMAGE),
    "alias": (lambda: nn.Sequential(Alias(), Alias()), ROW),
    "passed on": (lambda: nn.Sequential(PassedOn(), PassedOn()), ROW),
    "shared": (Shared, ROW),
    "containers": (Containers, ROW),
    "opaque": (Opaque, ROW),
    "inference": (Inference, ROW),
    "compiled inside": (_compiled_inside, ROW),
    "compiled itself": (_compiled_itself, ROW),
    "all compiled": (_all_compiled, ROW),
    "scripted inside": (_scripted_inside, ROW),
    "timm resnet": (lambda: timm.create_model("test_resnet", in_chans=1), (2, 1, 32, 32)),
    "timm vit": (lambda: timm.create_model("test_vit", img_size=32), (2, 3, 32, 32)),
    "timm efficientnet": (lambda: timm.create_model("test_efficientnet"), (2, 3, 32, 32)),
}


def _vectors(layers, count, generator):
    """Rank vectors, each of which differs from the one before in a layer or two, or in none."""
    full = [min(layer.weight.flatten(1).shape) for layer in layers.values()]
    ranks = list(full)
    for _ in range(count):
        for _ in range(int(torch.randint(3, (), generator=generator))):
            layer = int(torch.randint(len(ranks), (), generator=generator))
            ranks[layer] = int(torch.randint(1, full[layer] + 1, (), generator=generator))
        yield tuple(ranks)


def _outputs(model, layers, vectors, inputs, reuse):
    outputs, previous = [], None
    with evaluation(model), TruncatedWeights(layers, 1) as weights, PrefixReuse(model, layers, enabled=reuse) as runs:
        for x in inputs:
            for index, ranks in enumerate(vectors):
                weights.apply(ranks)
                names = [name for name, a, b in zip(layers, ranks, previous or ranks, strict=True) if a != b]
                runs.start(names if index else None)
                outputs.append(model(x).clone())
                previous = ranks
    return outputs


def _plain_outputs(model, layers, vectors, inputs):
    outputs = []
    for x in inputs:
        for ranks in vectors:
            with evaluation(model), TruncatedWeights(layers, 1) as weights:
                weights.apply(ranks)
                outputs.append(model(x).clone())
    return outputs


def _layers(model):
    chosen = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    names = [name for name in chosen if getattr(model.get_submodule(name), "groups", 1) == 1]
    return select_layers(model, names)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_bitwise_those_of_whole_runs(name):
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    model = build().eval()
    if not any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        model = model.double()
    layers = _layers(model)
    generator = torch.Generator().manual_seed(1)
    vectors = list(_vectors(layers, 8 if "timm" in name else 20, generator))
    dtype = next(model.parameters()).dtype
    inputs = torch.randn((2, *shape), generator=generator, dtype=dtype)
    expected = _plain_outputs(model, layers, vectors, inputs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    actual = _outputs(model, layers, vectors, inputs, reuse=True)
    assert len({tuple(out.flatten().tolist()) for out in expected}) > 4  # the ranks matter
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def _counted(model, layers):
    counts = Counter()
    for name, layer in layers.items():
        original = type(layer).forward

        def forward(x, layer=layer, name=name, original=original):
            counts[name] += 1
            return original(layer, x)

        vars(layer)["forward"] = forward
    return counts


def test_only_what_comes_after_the_first_change_is_computed():
    model = _mlp().double().eval()
    layers = _layers(model)
    counts = _counted(model, layers)
    full, last, middle = (6, 7, 5), (6, 7, 2), (6, 3, 2)
    _outputs(model, layers, [full, last, last, middle], torch.randn(1, 4, 6).double(), reuse=True)
    assert counts == {"0": 1, "2.0": 2, "3": 3}  # equal ranks again compute nothing
    counts.clear()
    _outputs(model, layers, [full, last, last, middle], torch.randn(1, 4, 6).double(), reuse=False)
    assert counts == {"0": 4, "2.0": 4, "3": 4}


def test_a_block_is_replayed_as_a_whole():
    torch.manual_seed(0)
    blocks = nn.Sequential(Residual(), Residual(8, 6), nn.Flatten(), nn.Linear(150, 3)).double().eval()
    layers = _layers(blocks)
    counts = _counted(blocks, layers)
    full = tuple(min(layer.weight.flatten(1).shape) for layer in layers.values())
    _outputs(blocks, layers, [full, (*full[:-1], 1)], torch.randn(1, *IMAGE).double(), reuse=True)
    assert counts == dict.fromkeys(layers, 1) | {"3": 2}


def test_an_activation_in_place_does_not_make_the_layer_before_it_run_again():
    model = nn.Sequential(nn.Linear(6, 7), nn.ReLU(inplace=True), nn.Linear(7, 5)).double().eval()
    layers = _layers(model)
    counts = _counted(model, layers)
    _outputs(model, layers, [(6, 5), (6, 2), (6, 1)], torch.randn(1, 4, 6).double(), reuse=True)
    assert counts == {"0": 1, "2": 3}


def test_hooks_inside_see_every_call():
    model = _mlp().double().eval()
    layers = {"3": model[3]}
    seen = []
    model[2][0].register_forward_hook(lambda *_: seen.append("inner"))
    model[1].register_forward_pre_hook(lambda *_: seen.append("pre"))
    counts = _counted(model, {"0": model[0]})
    _outputs(model, layers, [(5,), (2,), (1,)], torch.randn(1, 4, 6).double(), reuse=True)
    assert seen == ["pre", "inner"] * 3
    assert counts == {"0": 1}


def test_the_forward_methods_are_those_from_before_also_after_an_error():
    model = _mlp().eval()
    own = model[1].forward
    vars(model[1])["forward"] = own
    layers = _layers(model)
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        _outputs(model, layers, [(6, 7, 5)], torch.randn(1, 4, 9), reuse=True)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == attributes
    assert vars(model[1])["forward"] is own


def test_a_model_that_goes_another_way_is_followed():
    class Alternating(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.last, self.turn = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), 0

        def forward(self, x):
            self.turn += 1
            return self.last(self.a(x) if self.turn % 2 else self.b(x))

    model = Alternating().double().eval()
    x = torch.randn(1, 4, 6).double()
    vectors = [(6, 6, 6), (6, 6, 3), (6, 6, 2)]
    model.turn = 0
    expected = _plain_outputs(model, _layers(model), vectors, x)
    model.turn = 0
    actual = _outputs(model, _layers(model), vectors, x, reuse=True)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_inside_of_what_is_compiled_as_a_whole_nothing_is_known():
    model = _mlp().eval()
    model.compile(backend="eager")
    with torch.no_grad(), PrefixReuse(model, _layers(model)) as runs:
        runs.start(None)
        model(torch.zeros(1, 6))
        assert runs.uncalled() == []
        assert set(runs.first_calls().values()) == {0}
        assert all("forward" not in vars(module) for module in model.modules())  # what is traced is not changed


def test_uncalled_layers_are_known():
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)}).eval()
    with torch.no_grad(), PrefixReuse(model, dict(model.items())) as runs:
        runs.start(None)
        model["used"](torch.zeros(1, 3))
        assert runs.uncalled() == ["unused"]
        assert runs.first_calls() == {"used": 0, "unused": 1}


def test_outputs_of_runs_that_are_over_are_freed():
    model = _mlp().double().eval()
    layers = _layers(model)
    outputs = []
    original = layers["2.0"].forward

    def forward(x):
        given = original(x)
        outputs.append(weakref.ref(given))
        return given

    vars(layers["2.0"])["forward"] = forward
    with evaluation(model), PrefixReuse(model, layers) as reuse:
        for _ in range(5):
            reuse.start(None)
            model(torch.randn(4, 6).double())
        assert [output() is not None for output in outputs] == [False] * 4 + [True]
