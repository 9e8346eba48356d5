"""Every argument of every public callback can be written in a LightningCLI YAML file."""

import inspect
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from tests.contract_by_hand import Model
from tests.contract_table import SETTINGS, Setting
from tests.models import Batches, fit, make_batches

BATCHES = make_batches(6)
TRAINER = """
seed_everything: 0
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 2
  precision: 64-true
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
"""


class FromYaml(Model):
    """Brings its own batches, and reads from YAML what the table sets."""

    def __init__(self, width: int = 5, views: int = 1, hidden: int = 8, clouds: bool = False) -> None:
        super().__init__(width=width, views=views, hidden=hidden, clouds=clouds)

    def train_dataloader(self) -> Batches:
        return Batches(BATCHES)


def run_cli(setting: Setting, folder: Path, monkeypatch: pytest.MonkeyPatch) -> LightningCLI:
    path = folder / "config.yaml"
    callbacks = "".join(f"    {line}\n" for line in setting.yaml.strip().splitlines())
    model = "".join(f"  {name}: {value}\n" for name, value in setting.model.items())
    path.write_text(f"{TRAINER}{callbacks}" + (f"model:\n{model}" if model else ""))
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", str(path)])
    return LightningCLI(FromYaml, save_config_callback=None)


@pytest.mark.parametrize("name", SETTINGS)
def test_yaml_trains_like_python(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    setting = SETTINGS[name]
    cli, expected = run_cli(setting, tmp_path, monkeypatch), setting.make()
    fit(expected, BATCHES, setting.callbacks())
    torch.testing.assert_close(dict(cli.model.state_dict()), dict(expected.state_dict()))
    kinds = [type(callback) for callback in cli.trainer.callbacks[: len(setting.callbacks())]]
    assert kinds == [type(callback) for callback in setting.callbacks()]


def test_the_table_writes_every_argument_in_yaml():
    written: dict[type, set[str]] = {}
    for setting in SETTINGS.values():
        for entry, callback in zip(yaml.safe_load(setting.yaml), setting.callbacks(), strict=True):
            assert entry["class_path"].rpartition(".")[2] == type(callback).__name__
            written.setdefault(type(callback), set()).update(entry["init_args"])
    for kind, names in written.items():
        assert names == set(inspect.signature(kind).parameters)


def test_a_wrong_value_in_yaml_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    setting = Setting(
        list,
        by_hand=None,
        logged=(),
        yaml="""
- class_path: lightning_plugins.callbacks.VNERegularization
  init_args: {layers: backbone, weight: 0.3, scope: globl}
""",
    )
    with pytest.raises(SystemExit):
        run_cli(setting, tmp_path, monkeypatch)
    assert "scope" in capsys.readouterr().err
