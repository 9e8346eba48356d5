import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_plugins.compression import LayerCost, factorize, layer_costs
from lightning_plugins.compression.costs.layer_costs import run


class Net(nn.Module):
    """Convolutions of several kinds, a layer that is called twice, one that is called by name, one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, (3, 5), stride=(2, 1), padding=(1, 2))
        self.mix = nn.Conv2d(8, 8, 3, padding="same", dilation=2)
        self.strided = nn.Conv2d(8, 12, 3, stride=2, bias=False)
        self.one_row = nn.Conv2d(12, 12, (1, 3), stride=2, padding=(2, 1), padding_mode="replicate")
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm = nn.BatchNorm2d(12)
        self.sequence = nn.Conv1d(12, 10, 3)
        self.tokens = nn.Linear(10, 9)
        self.twice = nn.Linear(9, 9, bias=False)
        self.unused = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        x = self.strided(self.mix(self.mix(self.stem(x))))
        x = self.norm(self.depthwise(self.one_row(x))).flatten(2)
        x = self.tokens(self.sequence(input=x * scale).transpose(1, 2))
        return self.twice(self.drop(self.twice(x).relu()))


X = torch.randn(2, 3, 14, 13)
LAYERS = ["stem", "mix", "strided", "one_row", "tokens", "twice", "unused"]


def counted(model, *args, **kwargs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*args, **kwargs)
    return counter.get_flop_counts()


def total(counts, name):
    return sum(counts.get(f"Net.{name}", {}).values())  # what is not called is not there


@pytest.mark.parametrize("scheme", [1, 2])
def test_operations_equal_those_that_torch_counts(scheme):
    names = LAYERS if scheme == 2 else [*LAYERS, "sequence"]
    costs = layer_costs(Net(), names, cost="flops", inputs=X, scheme=scheme)
    dense = counted(Net(), X)
    assert {name: cost.dense for name, cost in costs.items()} == {name: total(dense, name) for name in costs}
    assert costs["unused"] == LayerCost(0, 0, 4)
    for rank in (1, 3):
        small = factorize(Net(), rank, names, only_if_smaller=False, scheme=scheme)
        counts = counted(small, X)
        expected = {name: total(counts, name) for name in costs}
        assert {name: rank * cost.per_rank for name, cost in costs.items()} == expected
        rest = sum(dense["Global"].values()) - sum(cost.dense for cost in costs.values())
        assert sum(counts["Global"].values()) == rest + sum(rank * cost.per_rank for cost in costs.values())


@pytest.mark.parametrize("scheme", [1, 2])
def test_parameters_equal_those_of_the_layers(scheme):
    names = LAYERS if scheme == 2 else [*LAYERS, "sequence"]
    net = Net()
    costs = layer_costs(net, names, scheme=scheme)
    for name, rank in itertools.product(names, (1, 2)):
        pair = factorize(Net(), rank, name, only_if_smaller=False, scheme=scheme).get_submodule(name)
        assert costs[name].per_rank * rank == sum(part.weight.numel() for part in pair)
        assert costs[name].dense == net.get_submodule(name).weight.numel()


def test_globs_take_what_can_be_split_in_the_models_order():
    assert list(layer_costs(Net())) == [*LAYERS[:4], "sequence", *LAYERS[4:]]
    assert list(layer_costs(Net(), scheme=2)) == LAYERS


@pytest.mark.parametrize(
    "inputs", [(X,), {"x": X}, (X, 2.0), {"x": X, "scale": 2.0}], ids=["tuple", "dict", "two", "two by name"]
)
def test_inputs_may_be_a_tensor_a_tuple_or_a_dict(inputs):
    assert layer_costs(Net(), cost="flops", inputs=inputs) == layer_costs(Net(), cost="flops", inputs=X)


def test_model_is_left_as_it_was():
    net = Net()
    net.mix.eval()
    modes = {name: module.training for name, module in net.named_modules()}
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    layer_costs(net, cost="flops", inputs=X)
    assert {name: module.training for name, module in net.named_modules()} == modes
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in net.modules())


def test_model_is_left_as_it_was_when_its_forward_pass_fails():
    net = Net()
    with pytest.raises(RuntimeError, match="channels"):
        layer_costs(net, cost="flops", inputs=torch.zeros(1, 7, 9, 9))
    assert not any(module._forward_hooks for module in net.modules())
    assert net.training


def test_shared_layer_costs_its_calls_and_is_listed_once():
    layer = nn.Linear(6, 6)
    costs = layer_costs(nn.Sequential(layer, nn.ReLU(), layer), cost="flops", inputs=torch.zeros(5, 6))
    assert costs == {"0": LayerCost(2 * 2 * 5 * 36, 2 * 2 * 5 * 12, 6)}


def test_compiled_model_is_counted():
    model = torch.compile(nn.Sequential(nn.Linear(6, 5)), backend="eager")
    model(torch.zeros(2, 6))  # traced before the hooks are there
    assert layer_costs(model, cost="flops", inputs=torch.zeros(2, 6)) == {"0": LayerCost(120, 44, 5)}


def test_model_on_the_meta_device_is_counted():
    with torch.device("meta"):
        net, x = Net(), torch.empty(X.shape)
        costs = layer_costs(net, cost="flops", inputs=x)
    assert costs == layer_costs(Net(), cost="flops", inputs=X)


@pytest.mark.parametrize(
    ("cost", "break_even"),
    [
        (LayerCost(600, 50, 20), 11),  # 12 x 50 costs as much as the layer
        (LayerCost(601, 50, 20), 12),
        (LayerCost(600, 50, 7), 7),
        (LayerCost(5, 6, 1), 0),
        (LayerCost(0, 0, 4), 0),
    ],
)
def test_break_even_is_the_largest_rank_that_is_cheaper(cost, break_even):
    assert cost.break_even == break_even
    cheaper = [rank for rank in range(1, cost.full_rank + 1) if rank * cost.per_rank < cost.dense]
    assert max(cheaper, default=0) == break_even
    assert cost.at(cost.full_rank) == min(cost.dense, cost.full_rank * cost.per_rank)


BAD = [
    ({"cost": "flop"}, ValueError, "`cost` must be 'params' or 'flops', got 'flop'; did you mean 'flops'"),
    ({"cost": "flops"}, ValueError, "`inputs` must be given"),
    ({"cost": "flops", "inputs": [X]}, TypeError, "`inputs` must be a tensor.*got list; did you mean a tuple"),
    ({"inputs": X}, ValueError, "`inputs` must be left out with cost='params'"),
    ({"layers": "depthwise"}, ValueError, "'depthwise'.*12 groups"),
    ({"layers": "stm"}, ValueError, "did you mean 'stem'"),
    ({"layers": "norm*"}, ValueError, "'norm' is a BatchNorm2d"),
    ({"layers": "sequence", "scheme": 2}, ValueError, "'sequence'.*Conv1d.*`scheme=2`"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_mistakes_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        layer_costs(Net(), **arguments)


class ClassToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.last = nn.Parameter(torch.zeros(1, 4)), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.token.expand(x.shape[0], -1))


def test_views_of_parameters_are_counted_through():
    """torch's counter of operations raises on them by itself."""
    net = ClassToken()
    with FlopCounterMode(display=False) as counter:
        run(net, torch.zeros(3, 4))
    assert counter.get_total_flops() == 2 * 3 * 4 * 2
    assert all(parameter.requires_grad for parameter in net.parameters())
