"""The scripts under examples/ run, as scripts and as the notebooks made from them; one knob shortens them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbclient
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = [script for script in sorted(EXAMPLES.glob("*.py")) if "# %%" in script.read_text(encoding="utf-8")]
SHORT = {"EXAMPLE_STEPS": "2", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def run(script: Path, **environment: str) -> str:
    """Run a script as a user does, from another directory; return what it printed."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("EXAMPLE_")}
    finished = subprocess.run(
        [sys.executable, str(script)],
        env={**variables, "PYTHONPATH": str(ROOT), **SHORT, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def figures_of(output: str) -> list[Path]:
    return [Path(line.removeprefix("figure: ")) for line in output.splitlines() if line.startswith("figure: ")]


def assert_shows(pictures: list[Path]) -> None:
    assert pictures
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.width > 400


@pytest.mark.slow
@pytest.mark.distributed
def test_demo_collapses_without_the_callback_and_not_with_it():
    output = run(EXAMPLES / "demo.py")
    for name in ("without VNE", "weight=0.3"):
        assert output.count(name) == 1  # only one of the two processes reports
    assert_shows(figures_of(output))


@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda script: script.stem)
def test_script_runs(script):
    output = run(script)
    if "show(" in script.read_text():
        assert_shows(figures_of(output))
    else:
        assert "vne/net.fc/entropy" in output


def test_callback_example_on_a_folder_of_images(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 3)):
        for name in ("cat", "dog", "owl"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(256, size=(40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    output = run(EXAMPLES / "von_neumann_callback.py", EXAMPLE_IMAGES=str(tmp_path / "images"))
    assert output.count("Validate metric") == 1  # the table of the folder's own validation
    assert "representation/val/net.fc/entropy" in output.partition("Validate metric")[2]


def test_notebooks_are_those_of_the_scripts():
    assert NOTEBOOKS, "no example found"
    checked = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "notebooks.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == {path.stem for path in NOTEBOOKS}


@pytest.mark.slow
@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda script: script.stem)
def test_notebook_runs_and_shows_its_figure(script, monkeypatch, tmp_path):
    for name, value in {**SHORT, "PYTHONPATH": os.pathsep.join([str(ROOT), str(EXAMPLES)])}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = jupytext.read(script.with_suffix(".ipynb"))
    directory = str(tmp_path)
    if "von_neumann_yaml" in script.stem:
        directory = str(EXAMPLES)  # it reads the file beside it, and writes nothing
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": directory}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    shown = sum("image/png" in output.get("data", {}) for output in outputs)
    assert shown == len(figures_of(printed)) == len(re.findall(r"^ *show\(", script.read_text(), re.MULTILINE))
