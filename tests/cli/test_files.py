"""Checkpoint files as the commands read them, and the network that belongs to one."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_plugins.cli._files import Checkpoint, load_into, read_checkpoint


@pytest.mark.parametrize(
    ("said", "quoted"),
    [("no magic number. Update torch and try again", "no magic number"), ("not a zip\nat byte 3", "not a zip")],
)
def test_a_file_that_cannot_be_read_is_refused_with_the_first_sentence_of_the_reason(
    said: str, quoted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(said)

    (tmp_path / "text.pt").write_text("a text")
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(ValueError, match=rf"text\.pt' cannot be read so \({quoted}\); save `model\.state_dict\(\)`"):
        read_checkpoint(str(tmp_path / "text.pt"))


@pytest.mark.parametrize("place", [None, "state_dict", "model", "model_state_dict"])
def test_a_state_dict_is_found_and_put_back_at_its_place(place: str | None, tmp_path: Path):
    state = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    torch.save(state if place is None else {"epoch": 3, place: state}, tmp_path / "net.pt")
    found = read_checkpoint(str(tmp_path / "net.pt"))
    assert found.place == place
    assert {name: value.tolist() for name, value in found.state.items()} == {"weight": [[1.0] * 3] * 2, "bias": [0, 0]}
    other = {"weight": torch.zeros(1)}
    assert found.with_state(other) == (other if place is None else {place: other})


def test_of_a_lightning_checkpoint_everything_but_the_training_stays():
    whole = {"pytorch-lightning_version": "2.5", "epoch": 3, "optimizer_states": [], "callbacks": {}, "state_dict": {}}
    changed = Checkpoint(whole, "state_dict", {}).with_state({"weight": torch.ones(1)})
    assert set(changed) == {"pytorch-lightning_version", "epoch", "state_dict"}
    assert changed["state_dict"] == {"weight": torch.ones(1)}


@pytest.mark.parametrize("prefix", ["", "net."])
def test_the_prefix_is_the_one_under_which_most_names_are(prefix: str):
    model = nn.Linear(3, 2)
    own = {f"{prefix}{name}": torch.ones_like(value) for name, value in model.state_dict().items()}
    others = {"other.bias": torch.zeros(7)} if prefix else {}  # such as those of a loss
    assert load_into(model, {**own, **others}) == prefix
    assert model.weight.eq(1).all()
    assert model.bias.eq(1).all()
