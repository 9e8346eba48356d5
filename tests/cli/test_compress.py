"""Refusals of `compress`, and that they come before any work."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_plugins.cli import main
from tests.cli.test_cli import OPTIONS, Net


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(Net().state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


def pair_in_a_list(model: torch.nn.Module) -> list[int]:
    return [1, 2]


def triple(model: torch.nn.Module) -> tuple[int, ...]:
    return 1, 2, 3


@pytest.mark.parametrize(("data", "kind"), [("pair_in_a_list", "list"), ("triple", "tuple")])
def test_data_must_be_a_pair(data: str, kind: str, saved: Path, capsys: Any):
    given = f"tests.cli.test_compress:{data}"
    assert main(["compress", str(saved), *OPTIONS, "--method", "beam_search", "--data", given]) == 1
    assert f"`data='{given}'` must return batches and a score function, got {kind}" in capsys.readouterr().err
    assert list(saved.parent.iterdir()) == [saved]


def test_a_missing_extra_is_named_before_any_work(saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("lightning_plugins.cli._compress.read_checkpoint", lambda _: pytest.fail("it was read"))
    assert main(["compress", str(saved), *OPTIONS]) == 1
    assert "pip install 'lightning-plugins[plots]'" in capsys.readouterr().err
