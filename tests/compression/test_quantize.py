import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_plugins.compression import (
    Calibration,
    apply_thresholds,
    equal_ratio,
    factorize,
    find_channel_groups,
    load_quantized,
    quantize,
)

X = torch.randn(32, 24, generator=torch.Generator().manual_seed(0))


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


def test_low_rank_and_integers_combine(tmp_path: Path):
    net = make_net()
    small = factorize(copy.deepcopy(net), 0.4, calibration=Calibration(net).record([X]))
    exact, floating = small(X), tmp_path / "float.pt"
    torch.save(small.state_dict(), floating)
    with torch.no_grad():
        rows = small[0][0].weight
        scale = rows.abs().amax(1, keepdim=True) / 127.5
        expected = (rows / scale).round().clamp(-128, 127) * scale
    quantize(small)
    assert float((small[0][0].weight.dequantize() - expected).abs().max()) < float(scale.max())
    assert float(((small(X) - exact).norm() / exact.norm()).detach()) < 0.02
    torch.save(small.state_dict(), tmp_path / "int8.pt")
    again = load_quantized(make_net(), torch.load(tmp_path / "int8.pt", weights_only=True))
    assert torch.equal(again(X), small(X))
    assert not any(p.requires_grad for name, p in again.named_parameters() if name.endswith("weight"))
    assert torch.equal(
        load_quantized(make_net(), torch.load(floating)).state_dict()["0.1.weight"], torch.load(floating)["0.1.weight"]
    )


def test_bytes_fall_to_about_a_quarter(tmp_path: Path):
    net = nn.Sequential(nn.Linear(512, 512))
    for name, model in (("float", net), ("int8", quantize(copy.deepcopy(net)))):
        torch.save(model.state_dict(), tmp_path / name)
    assert (tmp_path / "int8").stat().st_size < 0.3 * (tmp_path / "float").stat().st_size


def test_a_layer_of_rank_1_keeps_its_second_half():
    net = quantize(factorize(make_net(), 1))
    assert [type(half.weight.data) is torch.Tensor for half in net[0]] == [False, True]
    assert net(X).shape == (32, 4)


def test_tied_weights_stay_tied():
    net = nn.ModuleDict({"embedding": nn.Embedding(9, 8), "body": nn.Linear(8, 8), "head": nn.Linear(8, 9, bias=False)})
    net["head"].weight = net["embedding"].weight
    quantize(net)
    assert net["head"].weight is net["embedding"].weight
    assert type(net["body"].weight.data) is not torch.Tensor


def test_only_layers_that_are_called_as_such_are_quantised():
    class Own(nn.Linear):
        pass

    net = nn.ModuleDict(
        {"a": nn.MultiheadAttention(8, 2), "b": Own(8, 8), "c": nn.Linear(8, 8), "d": nn.Conv1d(8, 8, 1)}
    )
    quantize(net)
    kinds = {name: type(module.weight.data) for name, module in net.named_modules() if hasattr(module, "weight")}
    assert {name for name, kind in kinds.items() if kind is not torch.Tensor} == {"c"}


FIRST_QUANTISED: dict[str, Callable[[nn.Module], Any]] = {
    "factorize": lambda net: factorize(net, 0.5),
    "factorize one layer": lambda net: factorize(net, 0.5, "0"),
    "ranks": lambda net: equal_ratio(net, budget=0.5),
    "calibration": Calibration,
    "channels": lambda net: find_channel_groups(net, X),
    "thresholds": apply_thresholds,
}


@pytest.mark.parametrize("what", sorted(FIRST_QUANTISED))
def test_the_other_way_round_is_refused_by_name(what: str):
    net = quantize(make_net())
    with pytest.raises(ValueError, match=r"quantised.*compress first and quantise last"):
        FIRST_QUANTISED[what](net)


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch):
    net = make_net()
    with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module, got list"):
        quantize([net])  # type: ignore[type-var]
    with pytest.raises(ValueError, match="must match modules of the types Linear"):
        quantize(nn.Sequential(nn.Conv2d(3, 3, 3)))
    net[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the weight of '0' must be finite"):
        quantize(net)
    done = quantize(make_net())
    with pytest.raises(ValueError, match="must not be quantised twice, but '0' is; quantise once, as the last step"):
        quantize(done)
    with pytest.raises(ValueError, match="`state_dict` must be one of Sequential"):
        load_quantized(make_net(), {"strange": torch.zeros(2)})
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-plugins\[quantization\]'"):
        quantize(make_net())
