"""Files of a command never destroy one another, an input, or a good file by half."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_plugins.cli import main
from lightning_plugins.cli._outputs import beside, write_whole
from tests.cli.test_cli import OPTIONS, Net


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(Net().state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("net.pt", "would overwrite the input"),
        ("link.pt", "would overwrite the input"),
        ("there.pt", "exists already; pass another name, or `--force true`"),
        ("folder.pt", "is a folder"),
    ],
)
def test_a_collision_is_refused_before_anything_is_read(name, message, saved, capsys):
    (saved.parent / "link.pt").symlink_to(saved)
    (saved.parent / "there.pt").write_text("mine")
    (saved.parent / "folder.pt").mkdir()
    before = saved.read_bytes()
    assert main(["compress", str(saved), *OPTIONS, "--output", str(saved.parent / name)]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert saved.read_bytes() == before
    assert (saved.parent / "there.pt").read_text() == "mine"


@pytest.mark.parametrize("name", ["x.json", "x.png"])
def test_a_checkpoint_of_any_name_is_not_overwritten_by_its_report(name, saved):
    assert main(["compress", str(saved), *OPTIONS, "--output", str(saved.parent / name)]) == 0
    assert torch.load(saved.parent / name, weights_only=True)
    assert json.loads((saved.parent / f"{name}.json").read_text())


def test_names_with_dots_keep_reports_of_their_own():
    assert {beside(Path(name), ".json").name for name in ("small-v0.9", "small-v0.95", "a.ckpt")} == {
        "small-v0.9.json",
        "small-v0.95.json",
        "a.json",
    }


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("good")

    def half(part: Path) -> None:
        part.write_text("ha")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write_whole(path, half)
    assert path.read_text() == "good"
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_inspect_reads_what_is_unusual_and_writes_json(tmp_path):
    state = {
        "[/bold].weight": torch.randn(4, 3),
        "sparse.weight": torch.randn(4, 3).to_sparse(),
        "meta.weight": torch.empty(4, 3, device="meta"),
        "strideless.weight": torch.ones(1, 1).expand(4, 3),
        "nan.weight": torch.full((4, 3), float("nan")),
        "half.weight": torch.randn(4, 3).half(),
    }
    torch.save(state, tmp_path / "odd.pt")
    assert main(["inspect", str(tmp_path / "odd.pt"), "--output", str(tmp_path / "odd")]) == 0
    read = json.loads((tmp_path / "odd.json").read_text(), parse_constant=pytest.fail)
    assert set(read) == set(state) - {"meta.weight"}
    assert main(["inspect", str(tmp_path / "odd.pt"), "--output", str(tmp_path / "odd")]) == 1  # it is there


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(9, 16), nn.Linear(16, 12)
        self.example_input_array = {"tokens": torch.zeros(1, 4, dtype=torch.long)}

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc(self.embed(tokens))


class WithoutExample(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = None


def test_inputs_by_name_tokens_and_none(tmp_path):
    torch.save(Tokens().state_dict(), tmp_path / "t.pt")
    run = ["compress", str(tmp_path / "t.pt"), "--layers", "fc", "--force", "true", "--output", str(tmp_path / "o.pt")]
    own = "tests.cli.test_outputs"
    assert main([*run, "--model", f"{own}:Tokens", "--cost", "flops"]) == 0
    shaped = ["--input_shape", "[1,4]", "--input_dtype", "int", "--cost", "flops"]
    assert main([*run, "--model", f"{own}:WithoutExample", *shaped]) == 0
    assert main([*run, "--model", f"{own}:WithoutExample", "--latency", "false"]) == 0
