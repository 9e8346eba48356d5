import copy
import io
import json
import sys
import time
from typing import Any

import pytest
import timm
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_plugins.compression import (
    CompressionReport,
    Latency,
    LayerSize,
    NetworkCosts,
    UnitsKept,
    compression_report,
    factorize,
    layer_costs,
    measure_network,
)
from lightning_plugins.compression.costs import network_costs
from lightning_plugins.plots import compression_figure
from tests.models import Classifier


def by_torch(model: nn.Module, *inputs: Any, **named: Any) -> int:
    model.eval()
    with FlopCounterMode(display=False) as counter:  # with gradients: without, torch's encoder layers count as nothing
        model(*inputs, **named)
    return counter.get_total_flops()


class Attends(nn.Module):
    """Reads the weights of a layer that is never called, calls another twice and another not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.twice, self.never = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        x = self.twice(self.twice(x)) * scale
        return self.norm(self.attention(x, x, x, need_weights=False)[0]) @ self.never.weight


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x))


IMAGES = torch.zeros(2, 3, 64, 64)
NETWORKS = {
    "resnet18": lambda: (timm.create_model("resnet18"), IMAGES),
    "resnet18, low rank": lambda: (factorize(timm.create_model("resnet18"), 0.3), IMAGES),
    "resnet18, scheme 2": lambda: (factorize(timm.create_model("resnet18"), 0.3, scheme=2), IMAGES),
    "mobilenet": lambda: (factorize(timm.create_model("mobilenetv3_small_100"), 0.3), IMAGES),
    "vit": lambda: (_vit(), IMAGES),
    "vit, low rank": lambda: (factorize(_vit(), 0.25), IMAGES),
    "attention": lambda: (Attends(), torch.zeros(3, 5, 8)),
    "encoder": lambda: (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.zeros(3, 5, 8)),
    "tied": lambda: (Tied(), torch.zeros(3, 5, dtype=torch.long)),
    "recurrent": lambda: (nn.LSTM(4, 6), torch.zeros(5, 2, 4)),
    "transposed": lambda: (nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.Conv2d(4, 6, 3, groups=2)), IMAGES),
    "nothing to learn": lambda: (nn.Flatten(), IMAGES),
}


def _vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)


@pytest.mark.parametrize("name", NETWORKS)
def test_counts_what_torch_counts(name):
    model, inputs = NETWORKS[name]()
    costs = measure_network(model, inputs, latency=False)
    assert costs.flops == by_torch(model, inputs)
    assert costs.params == sum(parameter.numel() for parameter in model.parameters())
    assert all(size.params >= 0 and size.flops >= 0 for size in costs.layers.values())


@pytest.mark.parametrize("name", ["resnet18", "vit"])
def test_layers_of_dense_and_low_rank_networks_stand_side_by_side(name):
    model, inputs = NETWORKS[name]()
    small = factorize(copy.deepcopy(model), 0.25)
    report = compression_report(model, small, inputs, latency=False)
    assert list(report.layers) == list(report.before.layers) == list(report.after.layers)
    for layer, cost in layer_costs(model, cost="flops", inputs=inputs).items():
        change = report.layers[layer]
        assert change.before.flops == cost.dense
        rank = max(1, round(0.25 * cost.full_rank))
        assert change.after.flops == (rank * cost.per_rank if change.before != change.after else cost.dense)
        bias = model.get_submodule(layer).bias
        weights = layer_costs(model, layer)[layer]
        assert change.before.params == weights.dense + (0 if bias is None else len(bias))
    assert report.params_ratio == 1 - report.after.params / report.before.params > 0.3
    assert report.flops_ratio == 1 - by_torch(small, inputs) / by_torch(model, inputs) > 0.3


def test_operations_belong_to_the_module_that_does_them():
    layers = measure_network(Attends(), torch.zeros(3, 5, 8), latency=False).layers
    linear = 2 * 15 * 8 * 8
    assert layers["twice"] == LayerSize(72, 2 * linear)
    assert layers["attention"].params == 3 * 72
    assert layers["attention"].flops >= 3 * linear
    assert layers["attention.out_proj"] == LayerSize(72, 0)  # read by the attention, not called
    assert layers["never"] == LayerSize(72, 0)
    assert layers["Attends"] == LayerSize(0, linear)  # a product of the model's own


def test_the_layers_in_an_encoder_are_counted_and_its_fast_path_is_left_as_it_was():
    model, inputs = NETWORKS["encoder"]()
    layers = measure_network(model, inputs, latency=False).layers
    assert layers["linear1"].flops == layers["linear2"].flops == 2 * 15 * 8 * 16
    assert torch.backends.mha.get_fastpath_enabled()


def test_shared_parameters_and_parametrizations_count_once_under_the_layer():
    tied = measure_network(Tied(), torch.zeros(3, dtype=torch.long), latency=False)
    assert (tied.layers["embedding"].params, tied.layers["head"].params, tied.params) == (28, 0, 28)
    assert tied.layers["head"].flops == tied.flops == 2 * 3 * 28
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    assert measure_network(model, torch.zeros(1, 4), latency=False).layers == {"0": LayerSize(18, 24)}


def test_pruned_layers_and_layers_that_are_gone():
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.ReLU())
    pruned = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Identity(), nn.PReLU())
    report = compression_report(dense, pruned, torch.zeros(1, 3, 7, 7), latency=False)
    assert report.layers == {
        "0": (LayerSize(224, 2 * 25 * 27 * 8), LayerSize(140, 2 * 25 * 27 * 5)),
        "1": (LayerSize(16, 0), LayerSize(10, 0)),
        "2": (LayerSize(584, 2 * 9 * 72 * 8), LayerSize(0, 0)),
        "3": (LayerSize(0, 0), LayerSize(1, 0)),
    }


@pytest.mark.parametrize("compiled", [False, True])
def test_the_network_is_left_as_it_was(compiled):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[1].eval()
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    handle = torch.compile(model, backend="eager") if compiled else model
    costs = measure_network(handle, torch.ones(2, 3, 5, 5), repeats=2)
    assert list(costs.layers) == ["0", "1"]
    assert [module.training for module in model.modules()] == [True, True, False, True]
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_inputs_of_all_kinds():
    x = torch.zeros(3, 5, 8)
    flops = measure_network(Attends(), x, latency=False).flops
    for inputs in ((x,), {"x": x, "scale": 2.0}):
        costs = measure_network(Attends(), inputs, repeats=1)
        assert costs.flops == flops
        assert costs.latency is not None
        assert costs.latency.runs == 1
    model = Classifier()
    assert compression_report(model, Classifier(width=2), torch.zeros(1, 6), latency=False).params_ratio > 0.2


class Sleeps(nn.Module):
    def __init__(self, milliseconds: float, log: list[float]) -> None:
        super().__init__()
        self.milliseconds, self.log = milliseconds, log

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(self.milliseconds)
        time.sleep(self.milliseconds / 1000)
        return x


def test_latency_is_measured_in_turns_after_a_warm_up():
    log: list[float] = []
    report = compression_report(Sleeps(12, log), Sleeps(3, log), torch.zeros(1), repeats=5)
    passes = log[2:]  # after one of each that counts operations
    assert passes == [12, 3] * (3 + 5)
    before, after = report.before.latency, report.after.latency
    assert before is not None
    assert after is not None
    assert (before.runs, after.runs) == (5, 5)
    assert 12 <= before.low_ms <= before.median_ms <= before.high_ms
    assert 3 <= after.median_ms < 12
    assert report.speedup == before.median_ms / after.median_ms > 1
    assert before.device.startswith("cpu, ")


def test_passes_of_the_warm_up_are_not_timed(monkeypatch):
    times = iter([100.0, 100.0, 100.0, 0.004, 0.001, 0.002])
    monkeypatch.setattr(network_costs, "_timed", lambda model, inputs: next(times))
    (latency,) = network_costs.measure_latencies([nn.Flatten()], torch.zeros(1), repeats=3)
    assert latency[:4] == pytest.approx((2.0, 1.5, 3.0, 3))


def test_costs_measured_earlier_stand_for_the_network():
    model, small = nn.Sequential(nn.Linear(20, 10)), factorize(nn.Sequential(nn.Linear(20, 10)), 2)
    inputs = torch.zeros(1, 20)
    earlier = measure_network(model, inputs, repeats=2)
    report = compression_report(earlier, small, inputs, repeats=3)
    assert report.before is earlier
    assert report.layers == compression_report(model, small, inputs, latency=False).layers
    assert report.speedup is not None


def made() -> CompressionReport:
    before = {"conv": LayerSize(12_345_678, 2_500_000_000), "norm": LayerSize(64, 0), "fc": LayerSize(5_130, 10_240)}
    after = {"conv": LayerSize(6_000_000, 900_000_000), "norm": LayerSize(64, 0), "fc": LayerSize(5_130, 10_240)}
    return CompressionReport(
        NetworkCosts(before, Latency(10.0, 9.5, 11.25, 30, "cpu, 2 threads")),
        NetworkCosts(after, Latency(4.0, 3.9, 4.1, 30, "cpu, 2 threads")),
    )


def shown(report: CompressionReport, **settings: Any) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.table(**settings))
    return console.export_text()


def test_table():
    text = shown(made())
    assert [line.split() for line in text.splitlines() if "conv" in line] == [
        [
            "│",
            "conv",
            "│",
            "12.3",
            "M",
            "│",
            "6",
            "M",
            "│",
            "51.4%",
            "│",
            "2.5",
            "G",
            "│",
            "900",
            "M",
            "│",
            "64.0%",
            "│",
        ]
    ]
    assert "2 other layers" in text
    assert "norm" not in text
    assert "10 ms (9.5 to 11.2) → 4 ms (3.9 to 4.1): 2.50 times as fast" in text
    assert "norm" in shown(made(), all_layers=True)
    assert "other layers" not in shown(made(), all_layers=True)
    without = CompressionReport(NetworkCosts(made().before.layers), NetworkCosts(made().after.layers))
    assert "fast" not in shown(without)
    assert without.speedup is None


def test_without_inputs_parameters_are_counted_alone(tmp_path):
    model, small = nn.Sequential(nn.Linear(20, 10), nn.BatchNorm1d(10)), nn.Sequential(nn.Linear(20, 10), nn.PReLU())
    factorize(small, 2, "0")
    report = compression_report(model, small, None, latency=False)
    assert report.layers == {
        "0": (LayerSize(210, None), LayerSize(70, None)),
        "1": (LayerSize(20, None), LayerSize(1, None)),
    }
    assert (report.before.flops, report.flops_ratio, report.counts_flops) == (None, None, False)
    assert CompressionReport.from_json(report.to_json()) == report
    assert str(report) == "parameters 230 → 71 (69.1% removed)"
    assert "FLOPs" not in shown(report)
    (axes,) = compression_figure(report).axes
    assert "230 → 71" in axes.get_title(loc="left")
    counted = compression_report(measure_network(model, torch.zeros(2, 20), latency=False), small, None, latency=False)
    assert (counted.flops_ratio, len(compression_figure(counted).axes)) == (None, 1)
    assert "FLOPs" not in shown(counted)


def test_totals_in_words():
    assert str(made()) == (
        "parameters 12.4 M → 6.01 M (51.4% removed), FLOPs 2.5 G → 900 M (64.0% removed), "
        "10 ms (9.5 to 11.2) → 4 ms (3.9 to 4.1): 2.50 times as fast "
        "(median and quartiles of 30 passes, cpu, 2 threads)"
    )


def test_json_goes_there_and_back():
    report = made()
    read = json.loads(report.to_json())
    assert (read["before"]["params"], read["after"]["flops"]) == (12_350_872, 900_010_240)
    assert read["speedup"] == 2.5
    assert read["after"]["layers"]["fc"] == {"params": 5130, "flops": 10240}
    assert CompressionReport.from_json(report.to_json()) == report
    without = CompressionReport(NetworkCosts({}), NetworkCosts({}))
    assert CompressionReport.from_json(without.to_json()) == without
    assert without.params_ratio == without.flops_ratio == 0


def test_figure(tmp_path):
    report = made()
    report.after.layers["new"] = LayerSize(1, 7)
    figure = compression_figure(report, title="a network")
    left, right = figure.axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["conv", "new"]  # the others are small and the same
    before, after = right.containers
    assert [bar.get_width() for bar in before] == [2_500_000_000, 0]
    assert [bar.get_width() for bar in after] == [900_000_000, 7]
    assert "64.0% removed" in right.get_title(loc="left")
    assert "2.50 times as fast" in figure.get_supxlabel()
    figure.savefig(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    alone = NetworkCosts({"empty": LayerSize(0, 0)})
    without = compression_figure(CompressionReport(alone, alone))
    assert without.get_supxlabel() == ""
    assert [text.get_text() for text in without.axes[0].get_yticklabels()] == ["empty"]


def chosen() -> CompressionReport:
    """Two layers of which units were chosen, one of them of rank 3 by now, and a budget."""
    before, after = made().before.layers, made().after.layers
    kept = {"conv": UnitsKept(40, 64), "norm": UnitsKept(40, 64)}
    return CompressionReport(
        NetworkCosts(before, ranks={"fc": 5}), NetworkCosts(after, ranks={"fc": 5, "conv": 3}), kept, "flops", 0.4
    )


def test_what_was_chosen_under_a_budget_is_told(tmp_path):
    report = chosen()
    assert report.ranks == {"conv": 3}  # the other one was there before
    assert report.share == 900_010_240 / 2_500_010_240
    assert report.notes() == {"conv": "40 of 64, rank 3", "norm": "40 of 64"}
    assert str(report).endswith("FLOPs 2.5 G → 900 M (64.0% removed), 0.36 of the FLOPs left, budget 0.4")
    text = shown(report)
    assert "40 of 64, rank 3" in text
    assert "0.36 of the FLOPs left, budget 0.4" in text
    assert "1 other layers" in text
    assert CompressionReport.from_json(report.to_json()) == report
    assert json.loads(report.to_json())["share"] == report.share
    of_params = CompressionReport(made().before, made().after, cost="params", budget=0.5)
    assert of_params.share == 6_005_194 / 12_350_872
    assert "0.486 of the parameters left, budget 0.5" in str(of_params)
    assert (made().share, made().within(), made().notes()) == (None, None, {})
    figure = compression_figure(report)
    left, right = figure.axes
    assert [text.get_text().strip() for text in right.texts] == ["40 of 64, rank 3"]  # the norm is small and the same
    assert not left.texts
    assert "budget 0.4" in figure.get_supxlabel()


def test_ranks_of_low_rank_layers_are_told():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(72, 10))
    small = factorize(copy.deepcopy(model), {"2": 3, "4": 5}, scheme=2)
    report = compression_report(model, small, torch.zeros(1, 3, 7, 7), latency=False)
    assert report.ranks == {"2": 3, "4": 5}
    assert compression_report(small, small, None, latency=False).ranks == {}


NET, X = nn.Sequential(nn.Linear(4, 3)), torch.zeros(1, 4)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "before is text": (lambda: compression_report("net", NET, X), TypeError, "`before` must be a module, got str"),
    "after is text": (lambda: compression_report(NET, "net", X), TypeError, "`after` must be a module, got str"),
    "after is costs": (
        lambda: compression_report(NET, NetworkCosts({}), X),
        TypeError,
        "`after` must be a module, got NetworkCosts",
    ),
    "no inputs": (
        lambda: compression_report(NET, NET, None),
        ValueError,
        "`inputs` must be given to measure the time.*`latency=False` to count parameters alone",
    ),
    "no inputs to measure with": (lambda: measure_network(NET, None), ValueError, "`inputs` must be given to measure"),
    "a list": (lambda: compression_report(NET, NET, [X]), TypeError, "`inputs` must be .* got list; .* a tuple?"),
    "no repeats": (lambda: compression_report(NET, NET, X, repeats=0), ValueError, "`repeats` must be at least 1"),
    "half a repeat": (lambda: measure_network(NET, X, repeats=1.5), TypeError, "`repeats` must be an int"),
    "a class": (lambda: measure_network(nn.Linear, X), TypeError, "`model` must be a module, got type"),
    "lazy": (
        lambda: measure_network(nn.Sequential(nn.LazyLinear(3)), X),
        ValueError,
        "`model` must have parameters with shapes, but '0.weight' is lazy; run a batch through it",
    ),
    "no latency to compare with": (
        lambda: compression_report(NetworkCosts({}), NET, X),
        ValueError,
        "`before` must have a latency .* or pass `latency=False`",
    ),
    "not JSON": (lambda: CompressionReport.from_json("what?"), ValueError, "`text` must be what `to_json` writes"),
    "other JSON": (
        lambda: CompressionReport.from_json('{"before": {}}'),
        ValueError,
        "`text` must be what `to_json` writes, got .*KeyError",
    ),
    "a list as JSON": (lambda: CompressionReport.from_json("[1]"), ValueError, "TypeError"),
    "nothing to draw": (
        lambda: compression_figure(CompressionReport(NetworkCosts({}), NetworkCosts({}))),
        ValueError,
        "`report` must have at least one layer",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_missing_rich_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.table", None)
    with pytest.raises(ImportError, match=r"lightning-plugins\[cli\]"):
        made().table()
