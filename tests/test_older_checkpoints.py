"""Checkpoints that older versions wrote load into the callbacks of this one, and their trainings go on."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from lightning_plugins import callbacks
from tests.older_checkpoints.writing import EPOCHS, MAKE, SMALL, STEPS, Net, train

FOLDER = Path(__file__).parent / "older_checkpoints"
FILES = {f"{file.parent.name}/{file.stem}": file for file in sorted(FOLDER.glob("*/*.pt"))}


def test_there_are_checkpoints_of_every_callback_with_a_state():
    kinds = [value for name in callbacks.__all__ if isinstance(value := getattr(callbacks, name), type)]
    stateful = {
        kind.__name__ for kind in kinds if issubclass(kind, Callback) and kind.state_dict is not Callback.state_dict
    }
    latest = max(file.parent for file in FILES.values())
    assert stateful == set(MAKE) == {file.stem.removesuffix("-small") for file in latest.glob("*.pt")}


@pytest.mark.parametrize("case", FILES)
def test_a_training_goes_on(case: str, monkeypatch: pytest.MonkeyPatch):
    name, small = FILES[case].stem.removesuffix("-small"), FILES[case].stem.endswith("-small")
    saved = torch.load(FILES[case], weights_only=True)
    states = [state for key, state in saved["callbacks"].items() if key.startswith(name)]
    callback, model, loaded = MAKE[name](), Net(), []
    load = callback.load_state_dict
    monkeypatch.setattr(callback, "load_state_dict", lambda state: (loaded.append(state), load(state)))
    trainer = train(model, callback, ckpt_path=FILES[case])
    assert [list(state) for state in loaded[-1:]] == [list(state) for state in states]  # it was found by its key
    assert trainer.global_step == EPOCHS * STEPS
    weights = model.state_dict()
    assert all(bool(value.isfinite().all()) for value in weights.values())
    assert any(not torch.equal(value, saved["state_dict"].get(key, value[:0])) for key, value in weights.items())
    if name in SMALL:
        assert callback.report is not None
        assert callback.report.params_ratio > 0
    if small:
        assert {key: value.shape for key, value in weights.items()} == {
            key: value.shape for key, value in saved["state_dict"].items()
        }
