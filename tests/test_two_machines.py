"""A Trainer of two nodes, whose two machines are namespaces with a link between them where that is allowed."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # the script imports its neighbours as it does when it is run
two_machines = importlib.import_module("two_machines")
exchanges = importlib.import_module("_scaling_exchanges")
cases = importlib.import_module("_scaling_cases")

CASE = "WeightRegularization"


def trained(tmp_path: Path) -> list[dict[str, Any]]:
    """Results of the script on both machines: with a link, or on the loopback if it says why there is none."""
    command = [
        sys.executable,
        str(two_machines.SCRIPT),
        "--rates",
        "200",
        "--store",
        str(tmp_path / "found.json"),
        CASE,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode == 0:
        return json.loads((tmp_path / "found.json").read_text())["rates"]["200"]
    assert two_machines.obstacle(), done.stderr  # no other reason is accepted
    assert f"two machines cannot be made here: {two_machines.obstacle()}" in done.stderr
    done = subprocess.run([*command, "--without-link"], capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.distributed
@pytest.mark.slow
def test_two_nodes_train_like_one_process(tmp_path: Path):
    found = trained(tmp_path)
    size = exchanges.Size(*two_machines.SHAPES[CASE], 1)
    expected = two_machines.outcome(size, CASE, None)
    every = cases.CASES[CASE].exchanges(exchanges.Size(*two_machines.SHAPES[CASE], 2))
    received = sum(one[CASE]["with"]["bytes"] - one[CASE]["bare"]["bytes"] for one in found) / 2
    assert received == pytest.approx(sum(one.received(2) + one.headers(2) for one in every), rel=0.2)
    assert found[0][CASE]["weights"] == found[1][CASE]["weights"]
    assert found[0][CASE]["weights"] == pytest.approx(expected, rel=1e-4)


def test_commands_of_a_link_are_those_of_the_script():
    commands = two_machines.link(100)
    assert commands[:2] == ["ip netns add left", "ip netns add right"]
    assert sum("rate 100mbit" in command for command in commands) == 2


@pytest.mark.parametrize(
    ("there", "allowed", "told"), [(False, True, "ip and tc must be"), (True, False, "must be allowed")]
)
def test_an_obstacle_is_named(there: bool, allowed: bool, told: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(two_machines.shutil, "which", lambda program: f"/sbin/{program}" if there else None)
    ends = subprocess.CompletedProcess([], 0 if allowed else 1, stderr="Operation not permitted")
    monkeypatch.setattr(two_machines.subprocess, "run", lambda *_, **__: ends)
    assert told in two_machines.obstacle()
