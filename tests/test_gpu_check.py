"""The check for a GPU runs on a CPU, with sizes of a test, so that it cannot rot."""

import importlib
import json
import logging
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_plugins import callbacks, functional

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))  # the script imports its neighbours as it does when it is run
gpu_check = importlib.import_module("gpu_check")
gpu_tables = importlib.import_module("gpu_tables")
further_cases = importlib.import_module("gpu_parts.further_cases")
networks = importlib.import_module("gpu_parts.networks")
numerics = importlib.import_module("gpu_parts.numerics")
recorder = importlib.import_module("gpu_parts.recorder")
syncs = importlib.import_module("gpu_parts.syncs")

ON_CPU = ["--device", "cpu", "--tiny", "--budget-s", "4000"]


@pytest.fixture(autouse=True)
def _settings_are_restored():
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels, threads, path = [logger.level for logger in loggers], torch.get_num_threads(), list(sys.path)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    torch.set_num_threads(threads)
    sys.path[:] = path


def new_recorder(folder, seconds=100.0):
    return recorder.Recorder(folder / "out.json", "cpu", True, time.monotonic() + seconds, {"device": "a CPU"})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", [name for name in gpu_check.PARTS if name != "contract"])
def test_a_part_passes(part, tmp_path, capsys):
    assert gpu_check.main([*ON_CPU, "--parts", part, "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    items = report["parts"][part]
    assert len(items) > 1
    assert {entry["status"] for entry in items.values()} == {"passed"}
    assert report["about"]["versions"]["torch"] == torch.__version__
    page = gpu_tables.page(report)
    assert gpu_tables.MEANING[part] in page
    if part == "tables":
        for title in ("published formula", "the terms add", "masks and thresholds add", "GAP against"):
            assert title in page


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore")
def test_the_contract_passes_on_one_process_and_on_two(tmp_path, capsys):
    assert gpu_check.main([*ON_CPU, "--parts", "contract", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    items = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]["contract"]
    assert items["two processes, gloo: vne, queue"]["difference"] <= 1e-6


def test_every_function_and_callback_has_a_row():
    functions = {case.function for case in numerics.cases().values()}
    assert functions | {*numerics.CONTAINERS, *further_cases.ON_THE_HOST} == set(functional.__all__)
    assert all(issubclass(getattr(functional, name), tuple) for name in numerics.CONTAINERS)
    made = {type(make()).__name__ for make in networks.CALLBACKS.values()}
    assert made | networks.NOT_IN_A_STEP.keys() == set(callbacks.__all__)
    assert not made & networks.NOT_IN_A_STEP.keys()


def test_wrong_numbers_are_found():
    case = numerics.cases()["diagonal_entropy"]
    wrong = numerics.Case(case.function, case.inputs, lambda z: case.call(z) * (1 + 0.01 * (z.dtype != torch.float64)))
    assert numerics.check(case, "cpu")["problems"] == []
    assert len(numerics.check(wrong, "cpu")["problems"]) == 3


def test_a_step_that_reads_a_value_is_found(monkeypatch):
    callback = networks.CALLBACKS["vne"]

    def reading():
        made = callback()
        made.on_after_backward = lambda trainer, module: module.head.weight.grad.sum().item()
        return made

    monkeypatch.setitem(networks.CALLBACKS, "vne", reading)
    data = {}
    with pytest.raises(RuntimeError, match="5 waits in 5 steps"):
        syncs.check("vne", "cpu", data)
    assert "_local_scalar_dense" in next(iter(data["waits"]))


def test_what_fails_is_written_down_and_the_rest_goes_on(tmp_path):
    found = new_recorder(tmp_path)
    with found.item("numerics", "wrong") as data:
        data["seen"] = 1
        raise ArithmeticError("off by one")
    with found.item("numerics", "absent"):
        raise ModuleNotFoundError("No module named 'torch_pruning'", name="torch_pruning")
    with found.item("numerics", "our own module is gone"):
        raise ModuleNotFoundError("No module named 'lightning_plugins.other'", name="lightning_plugins.other")
    with found.within(0.0), found.item("numerics", "late"):
        found.require_time()
    items = json.loads(found.path.read_text())["parts"]["numerics"]
    assert [entry["status"] for entry in items.values()] == ["failed", "not installed", "failed", "out of time"]
    assert items["wrong"]["seen"] == 1
    assert "ArithmeticError: off by one" in items["wrong"]["traceback"]
    assert len(found.failures()) == 3
    assert "off by one" in gpu_tables.page({"about": {**found.about, "versions": {}, "date": ""}, "parts": found.parts})


def test_the_exit_status_tells_of_a_failure(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(numerics, "run", lambda _: 1 / 0)
    assert gpu_check.main([*ON_CPU, "--parts", "numerics", "--out", str(tmp_path)]) == 1
    assert "1 failed" in capsys.readouterr().out


def test_a_part_that_takes_too_long_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(numerics, "run", lambda _: time.sleep(60))
    monkeypatch.setattr(gpu_check, "MARGIN", 0.1)
    found = new_recorder(tmp_path)
    gpu_check.run_part(found, "numerics", seconds=0.1)
    assert found.parts["numerics"]["part"]["status"] == "out of time"


def test_without_a_gpu_the_default_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_check.main([])
    assert "--device cpu --tiny" in capsys.readouterr().err
