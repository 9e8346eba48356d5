import sys
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn

from lightning_plugins.compression import factorize
from lightning_plugins.compression.reports.export import export_onnx


def convolutions(scheme: int = 1) -> nn.Module:
    """Strides, dilation, paddings of two modes, one dimension and two, and a linear layer."""
    network = nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=2, dilation=2, padding_mode="reflect"),
        nn.Conv2d(16, 10, (3, 1), padding="same"),
        nn.Flatten(2),
        nn.Conv1d(10, 12, 3, padding=1),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(12, 9),
    )
    network = network[:6] if scheme == 2 else network
    return factorize(network, 2, scheme=scheme)


def transformer() -> nn.Module:
    return factorize(timm.create_model("test_vit", img_size=32, num_classes=5), 0.25)


class Answers(nn.Module):
    """Takes two inputs by name and gives two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = factorize(nn.Sequential(nn.Linear(8, 8)), 2)

    def forward(self, x: Tensor, *, bias: Tensor) -> dict[str, Tensor]:
        return {"sum": self.fc(x) + bias, "double": 2 * x}


NETWORKS = {
    "convolutions": lambda: (convolutions(), (torch.randn(2, 3, 12, 12),)),
    "convolutions, scheme 2": lambda: (convolutions(scheme=2), (torch.randn(2, 3, 12, 12),)),
    "transformer": lambda: (transformer(), (torch.randn(2, 3, 32, 32),)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_torch_export_gives_the_same(name):
    model, inputs = NETWORKS[name]()
    model.eval()
    assert any(isinstance(module, nn.Sequential) and len(module) == 2 for module in model.modules())
    program = torch.export.export(model, inputs)
    torch.testing.assert_close(program.module()(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["convolutions", "transformer"])
def test_onnx_runtime_gives_the_same(name, tmp_path):
    model, inputs = NETWORKS[name]()
    model.train()
    difference = export_onnx(model, inputs, tmp_path / "net.onnx")
    assert model.training
    model.eval()
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    others = tuple(torch.randn_like(given) for given in inputs)  # not those it was traced with
    feed = {wanted.name: given.numpy() for wanted, given in zip(session.get_inputs(), others, strict=True)}
    (found,) = session.run(None, feed)
    torch.testing.assert_close(torch.from_numpy(found), model(*others).detach(), rtol=1e-4, atol=1e-4)
    assert difference < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_inputs_by_name_and_several_outputs(tmp_path):
    inputs = {"x": torch.randn(3, 8), "bias": torch.ones(8)}
    assert export_onnx(Answers(), inputs, tmp_path / "net.onnx") < 1e-6


class OtherRuntime(onnxruntime.InferenceSession):
    """A runtime that computes something a little different."""

    error = 0.0

    def run(self, *arguments: Any) -> list[Any]:
        return [output + np.float32(self.error) for output in super().run(*arguments)]


@pytest.mark.parametrize("error", [1e-2, float("nan")])
def test_a_file_that_computes_something_else_is_refused_and_removed(error, tmp_path, monkeypatch):
    monkeypatch.setattr(onnxruntime, "InferenceSession", OtherRuntime)
    monkeypatch.setattr(OtherRuntime, "error", error)
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"the ONNX file gives outputs that differ by .* from the network's"):
        export_onnx(model, torch.ones(1, 3), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["onnxruntime", "onnxscript"])
def test_missing_extra_is_named(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{missing}; run `pip install 'lightning-plugins\[onnx\]'`"):
        export_onnx(nn.Sequential(nn.Linear(3, 2)), torch.ones(1, 3), tmp_path / "net.onnx")
