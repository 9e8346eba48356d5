import configparser
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn

from lightning_plugins.cli import main
from lightning_plugins.compression import (
    Calibration,
    CompressionReport,
    beam_search,
    factorize,
    load_quantized,
    output_energy,
    quantize,
    restore_structure,
    trade_off,
)
from tests.models import Classifier, fit, make_batches

ROOT = Path(__file__).parents[2]


class Net(nn.Module):
    """The network of the tests; the command line imports it by its path."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, width, 3), nn.Linear(width, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).mean(dim=(2, 3)))


class Lit(Classifier):
    """Saves its hyperparameters, and says what it takes."""

    def __init__(self, width: int = 5) -> None:
        super().__init__(width=width)
        self.save_hyperparameters()
        self.example_input_array = torch.zeros(2, 6)


def data(model: nn.Module) -> Any:
    batches = [torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    with torch.no_grad():
        wanted = {id(batch): model(batch) for batch in batches}

    def score(small: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        return -(small(batch) - wanted[id(batch)]).square().sum(), len(batch)

    return batches, score


def no_data(model: nn.Module) -> list[int]:
    return [1]


def no_model() -> str:
    return "net"


HERE = "tests.cli.test_cli"
OPTIONS = ["--model", f"{HERE}:Net", "--input_shape", "[1,3,6,6]", "--latency", "false"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(Net().state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


def loaded(path: Path, model: nn.Module, key: str | None = None) -> nn.Module:
    state = torch.load(path, weights_only=True)
    state = state if key is None else state[key]
    restore_structure(model, state).load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("method", ["equal_ratio", "energy_threshold", "trade_off"])
@pytest.mark.parametrize("cost", ["params", "flops"])
def test_compresses_a_state_dict(saved: Path, method: str, cost: str, capsys: Any):
    arguments = ["--budget", "0.5", "--method", method, "--cost", cost, "--layers", '["conv", "fc"]']
    assert main(["compress", str(saved), *OPTIONS, *arguments]) == 0
    dense, small = loaded(saved, Net()), loaded(saved.with_name("net-compressed.pt"), Net())
    assert isinstance(small.conv, nn.Sequential)
    report = CompressionReport.from_json(saved.with_name("net-compressed.json").read_text())
    assert report.before.params == sum(p.numel() for p in dense.parameters())
    assert report.after.params == sum(p.numel() for p in small.parameters())
    assert getattr(report, f"{cost}_ratio") > 0.45  # of the layers' weights; biases stay
    assert saved.with_name("net-compressed.png").read_bytes().startswith(b"\x89PNG")
    assert "total" in capsys.readouterr().out


def test_the_network_that_comes_out_is_that_of_the_functions(saved: Path):
    target = saved.with_name("folder") / "small.pt"
    assert main(["compress", str(saved), *OPTIONS, "--budget", "0.4", "--scheme", "2", "--output", str(target)]) == 0
    expected = loaded(saved, Net())
    factorize(expected, trade_off(expected, budget=0.4, scheme=2).ranks, scheme=2)
    torch.testing.assert_close(dict(loaded(target, Net()).state_dict()), dict(expected.state_dict()), rtol=0, atol=0)
    assert target.with_suffix(".json").exists()


def test_searches_with_data(saved: Path):
    arguments = ["--method", "beam_search", "--data", f"{HERE}:data", "--budget", "0.6"]
    assert main(["compress", str(saved), *OPTIONS, *arguments]) == 0
    expected = loaded(saved, Net())
    batches, score = data(expected)
    found = beam_search(expected, batches, score, budget=0.6)
    small = loaded(saved.with_name("net-compressed.pt"), Net())
    torch.testing.assert_close(dict(small.state_dict()), dict(factorize(expected, found.ranks).state_dict()))


def calibration_data(model: nn.Module) -> Any:
    return data(model)[0]


def test_calibrates_and_quantises(saved: Path, capsys: Any):
    arguments = ["--method", "output_energy", "--calibration", f"{HERE}:calibration_data", "--budget", "0.6"]
    assert main(["compress", str(saved), *OPTIONS, *arguments, "--quantize", "int8"]) == 0
    expected = loaded(saved, Net())
    calibration = Calibration(expected).record(calibration_data(expected))
    factorize(expected, output_energy(expected, calibration, budget=0.6).ranks, calibration=calibration)
    target = saved.with_name("net-compressed.pt")
    small = load_quantized(Net(), torch.load(target, weights_only=True)).eval()
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(small(x), quantize(expected)(x))
    assert main(["compress", str(target), *OPTIONS]) == 1
    assert "is quantised; compress the floating one and quantise last" in capsys.readouterr().err


def test_the_older_name_of_the_budget(saved: Path):
    new, old = saved.with_name("new.pt"), saved.with_name("old.pt")
    assert main(["compress", str(saved), *OPTIONS, "--budget", "0.3", "--output", str(new)]) == 0
    with pytest.warns(FutureWarning, match=r"`ratio` was renamed: pass `budget=0\.3`"):
        assert main(["compress", str(saved), *OPTIONS, "--ratio", "0.7", "--output", str(old)]) == 0
    torch.testing.assert_close(torch.load(old), torch.load(new), rtol=0, atol=0)


def test_compresses_what_is_compressed_already(saved: Path):
    for name, following in (("net", "0.3"), ("net-compressed", "0.5")):
        layers = "fc" if name == "net" else "conv"
        arguments = [*OPTIONS, "--budget", following, "--layers", layers]
        assert main(["compress", str(saved.with_name(f"{name}.pt")), *arguments]) == 0
    small = loaded(saved.with_name("net-compressed-compressed.pt"), Net())
    assert isinstance(small.fc, nn.Sequential)
    assert isinstance(small.conv, nn.Sequential)


def test_lightning_checkpoints(tmp_path: Path):
    trainer = fit(Lit(width=7), make_batches(2), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "lit.ckpt")
    model = f"{HERE}:Lit"
    assert main(["compress", str(tmp_path / "lit.ckpt"), "--model", model, "--budget", "0.8"]) == 0
    path = tmp_path / "lit-compressed.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["hyper_parameters"] == {"width": 7}  # which also built the model
    assert not {"optimizer_states", "lr_schedulers", "loops", "callbacks"} & set(checkpoint)
    small = loaded(path, Lit(width=7), "state_dict")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in Lit(width=7).parameters())

    class Restores(Lit):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            restore_structure(self, checkpoint)

    again = Restores.load_from_checkpoint(path)
    torch.testing.assert_close(dict(again.state_dict()), dict(small.state_dict()), rtol=0, atol=0)


def test_a_network_inside_a_lightning_module_and_other_tensors_beside_it(tmp_path: Path):
    inner = {f"net.{name}": value for name, value in Net().state_dict().items()}
    torch.save({"model": {**inner, "center": torch.ones(3)}, "optimizer": {}}, tmp_path / "ssl.pth")
    assert main(["compress", str(tmp_path / "ssl.pth"), *OPTIONS]) == 0
    written = torch.load(tmp_path / "ssl-compressed.pth", weights_only=True)
    assert list(written) == ["model"]
    torch.testing.assert_close(written["model"]["center"], torch.ones(3))
    assert "net.conv.1.weight" in written["model"]
    assert not any(key.startswith("conv") or key == "net.conv.weight" for key in written["model"])


def test_exports_what_onnx_runtime_runs(saved: Path):
    path = saved.with_name("exported") / "net.onnx"
    assert main(["compress", str(saved), *OPTIONS, "--export", str(path)]) == 0
    x = torch.randn(1, 3, 6, 6)
    session = onnxruntime.InferenceSession(str(path))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    small = loaded(saved.with_name("net-compressed.pt"), Net())
    torch.testing.assert_close(torch.from_numpy(found), small(x).detach(), rtol=1e-4, atol=1e-4)


def test_inspects_any_checkpoint(tmp_path: Path, capsys: Any):
    weight = torch.diag(torch.tensor([3.0, 1.0, 1.0]))
    state = {
        "a.weight": weight,
        "conv.weight": torch.randn(4, 2, 3, 3),
        "norm.weight": torch.ones(3),
        "token": torch.ones(1, 1, 8),
        "index": torch.ones(4, 4).long(),
        "broken.weight": torch.full((2, 2), torch.nan),
    }
    torch.save(state, tmp_path / "any.pt")
    assert main(["inspect", str(tmp_path / "any.pt"), "--output", str(tmp_path / "out" / "any")]) == 0
    text = capsys.readouterr().out
    for shown in ("a.weight", "4x2x3x3", "1.222"):
        assert shown in text
    read = json.loads((tmp_path / "out" / "any.json").read_text())
    assert list(read) == ["a.weight", "conv.weight", "broken.weight"]
    assert read["a.weight"]["stable_rank"] == pytest.approx(11 / 9)
    assert read["a.weight"]["spectral_norm"] == pytest.approx(3)
    expected = torch.linalg.svdvals(state["conv.weight"].double().flatten(1))
    torch.testing.assert_close(
        torch.tensor(read["conv.weight"]["singular_values"]).double(), expected, rtol=1e-6, atol=0
    )
    assert (tmp_path / "out" / "any.png").read_bytes().startswith(b"\x89PNG")


def test_inspects_chosen_weights_and_writes_nothing_unless_asked(saved: Path, capsys: Any):
    assert main(["inspect", str(saved), "--layers", "fc"]) == 0
    text = capsys.readouterr().out
    assert "fc.weight" in text
    assert "conv" not in text
    assert list(saved.parent.iterdir()) == [saved]


def test_models_of_timm_say_what_they_take(tmp_path: Path):
    model = timm.create_model("test_vit", num_classes=4, img_size=32)
    torch.save(model.state_dict(), tmp_path / "vit.pt")
    arguments = ["--model", "timm:test_vit", "--model_args", "{num_classes: 4, img_size: 32}", "--latency", "false"]
    assert main(["compress", str(tmp_path / "vit.pt"), *arguments]) == 0
    small = loaded(tmp_path / "vit-compressed.pt", timm.create_model("test_vit", num_classes=4, img_size=32))
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())


def test_as_a_program(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "import torch\n\ndef net():\n    return torch.nn.Sequential(torch.nn.Linear(9, 8))\n"
    )
    torch.save(nn.Sequential(nn.Linear(9, 8)).state_dict(), tmp_path / "net.pt")
    command = [sys.executable, "-m", "lightning_plugins.cli", "compress", "net.pt", "--model", "mine:net"]
    command += ["--input_shape", "[1,9]"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert "times as fast" in " ".join(run.stdout.split())  # slow times are longer, and break the line elsewhere
    assert "wrote net-compressed.pt" in run.stdout


def test_the_entry_point_is_there():
    read = configparser.ConfigParser()
    read.read(ROOT / "setup.cfg")
    name, _, path = read["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, attribute = path.partition(":")
    assert name == "lightning-plugins"
    assert getattr(importlib.import_module(module), attribute) is main


# name: (arguments behind `compress net.pt`, what stderr says)
BAD = {
    "no such model": (["--model", f"{HERE}:Nett"], "has no 'Nett'; did you mean 'Net'?"),
    "no such module": (["--model", "no.where:Net"], "`model='no.where:Net'` cannot be imported: No module named"),
    "no colon": (["--model", "tests.cli"], "`model` must be written as 'package.module:callable', got 'tests.cli'"),
    "not callable": (["--model", f"{HERE}:HERE"], "must name something that can be called, got str"),
    "not a module": (["--model", f"{HERE}:no_model"], "must return a module, got str"),
    "no such timm model": (
        ["--model", "timm:resnet81"],
        "`model` must name a model of timm, got 'resnet81'; did you mean",
    ),
    "another network": (["--model", f"{HERE}:Lit"], "`state_dict` must be one of Lit"),
    "arguments": ([*OPTIONS, "--model_args", "{depth: 3}"], "`model_args` must be what"),
    "a larger checkpoint": ([*OPTIONS, "--model_args", "{width: 9}"], "`state_dict` must have the structure"),
    "no input": (["--model", f"{HERE}:Net"], "`input_shape` must be given for latency=true, such as [1,3,224,224]"),
    "an empty input": (
        ["--model", f"{HERE}:Net", "--input_shape", "[0,3,6,6]"],
        "`input_shape` must be of sizes",
    ),
    "budget": ([*OPTIONS, "--budget", "1.5"], "`budget`"),
    "percent": ([*OPTIONS, "--budget", "60"], "`budget`"),
    "layers": ([*OPTIONS, "--layers", "fcc"], "`layers`: no module is called 'fcc'; did you mean 'fc'"),
    "no data": ([*OPTIONS, "--method", "beam_search"], "`data` must be given with `method=beam_search`"),
    "needless data": (
        [*OPTIONS, "--data", f"{HERE}:data"],
        "with `method=beam_search` and with no",
    ),
    "bad data": ([*OPTIONS, "--method", "beam_search", "--data", f"{HERE}:no_data"], "must return batches and a score"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name: str, saved: Path, capsys: Any):
    arguments, message = BAD[name]
    assert main(["compress", str(saved), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compres"], "compres"),
        (["compress", "net.pt"], "model"),
        (["compress", "net.pt", "--model", "a:b", "--method", "svd"], "method"),
        (["inspect", "net.pt", "--lairs", "fc"], "lairs"),
    ],
    ids=["command", "no model", "method", "option"],
)
def test_arguments_that_cannot_be_parsed(arguments: list[str], message: str, capsys: Any):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code was run')",)


# name: (what the file holds, what stderr says)
FILES: dict[str, tuple[Any, str]] = {
    "code": ({"state_dict": Evil()}, "must hold tensors and plain values alone"),
    "no tensors": ({"epoch": 3, "lr": 0.1}, "must be a state dict or hold one under state_dict or model"),
    "a tensor": (
        torch.ones(3),
        "must be a state dict or hold one under state_dict or model or model_state_dict, got",
    ),
    "vectors": ({"norm.weight": torch.ones(3)}, "`layers` must match a weight with two rows and columns or more"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_hold_something_else(name: str, tmp_path: Path, capsys: Any):
    content, message = FILES[name]
    torch.save(content, tmp_path / "file.pt")
    assert main(["inspect", str(tmp_path / "file.pt")]) == 1
    assert message in capsys.readouterr().err


def test_folders_and_other_files(tmp_path: Path, capsys: Any):
    assert main(["inspect", str(tmp_path)]) == 1
    assert "is a folder; consolidate a sharded checkpoint first" in capsys.readouterr().err
    (tmp_path / "text.pt").write_text("a text")
    assert main(["inspect", str(tmp_path / "text.pt")]) == 1
    assert "must hold tensors and plain values alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("jsonargparse", ["inspect", "net.pt"], "cli"),
        ("rich", ["inspect", "net.pt"], "cli"),
        ("timm", ["compress", "net.pt", "--model", "timm:resnet18"], "timm"),
        ("matplotlib", ["compress", "net.pt", *OPTIONS], "plots"),
        ("matplotlib", ["inspect", "net.pt", "--output", "out"], "plots"),
        ("onnxruntime", ["compress", "net.pt", *OPTIONS, "--export", "net.onnx"], "onnx"),
    ],
)
def test_missing_extras_are_named(
    missing: str, arguments: list[str], extra: str, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setitem(sys.modules, missing, None)
    assert main([arguments[0], str(saved), *arguments[2:]]) == 1
    assert f"pip install 'lightning-plugins[{extra}]'" in capsys.readouterr().err
