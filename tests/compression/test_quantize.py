import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from lightning_plugins.compression import (
    Calibration,
    apply_thresholds,
    channel_groups,
    equal_ratio,
    factorize,
    find_channel_groups,
    load_quantized,
    quantize,
    shrink,
)
from lightning_plugins.compression.networks.quantized import is_quantized

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


def make_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 8, "vocab_size": 19}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)).eval()


def compressed_gpt2(how: str) -> GPT2LMHeadModel:
    model = make_gpt2()
    if "factorised" in how:
        factorize(model, 5, "transformer.h.1.*")
    if "pruned" in how:
        groups = [group for group in channel_groups(model, {"input_ids": IDS}) if group.attention]
        shrink(model, groups, [torch.tensor([True, False, True, True]) for _ in groups])
    return model


IDS = torch.randint(19, (3, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("how", ["dense", "factorised", "pruned"])
def test_transposed_layers_become_linear_ones(how: str, tmp_path: Path):
    model = compressed_gpt2(how)
    exact = model(IDS).logits
    kinds = {name for name, module in model.named_modules() if type(module) is Conv1D}
    assert kinds
    quantize(model)
    for name in kinds:
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear
        assert is_quantized(layer.weight)
        assert not is_quantized(layer.bias)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert float(((model(IDS).logits - exact).norm() / exact.norm()).detach()) < 0.02
    torch.save(model.state_dict(), tmp_path / "int8.pt")
    again = load_quantized(make_gpt2(), torch.load(tmp_path / "int8.pt", weights_only=True)).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    wrapped = {"state_dict": {f"model.{name}": value for name, value in model.state_dict().items()}}
    module = nn.ModuleDict({"model": make_gpt2()})
    assert torch.equal(load_quantized(module, wrapped)["model"].eval()(IDS).logits, model(IDS).logits)


def test_a_transposed_layer_with_nan_is_named_and_nothing_changed():
    model = make_gpt2()
    model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the weight of 'transformer.h.1.mlp.c_fc' must be finite"):
        quantize(model)
    assert not any(is_quantized(parameter) for parameter in model.parameters())
    assert type(model.transformer.h[0].mlp.c_fc) is Conv1D
