"""The scripts under examples/ run, as scripts and as the notebooks made from them; one knob shortens them."""

import ast
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import jupytext
import nbclient
import numpy as np
import pytest
from PIL import Image

from tests.test_docs import tool

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = [script for script in sorted(EXAMPLES.glob("*.py")) if "# %%" in script.read_text(encoding="utf-8")]
SHORT = {"EXAMPLE_STEPS": "2", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
CPU_SECONDS = 600  # of processor time, which other work on the machine does not add to
HANGS = 3600  # seconds after which a process waits for something that will not come


def run(script: Path, **environment: str) -> str:
    """Run a script as a user does, from another directory; return what it printed."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("EXAMPLE_")}
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env={**variables, "PYTHONPATH": str(ROOT), **SHORT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    resource.prlimit(process.pid, resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    with process:
        try:
            printed, errors = process.communicate(timeout=HANGS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == 0, printed + errors
    return printed


def imported_names(source: str) -> set[str]:
    """The first parts of the names of all modules that a script imports."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.partition(".")[0] for name in names}


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
    if re.search(r"^ *show\(", script.read_text(encoding="utf-8"), re.MULTILINE):
        assert_shows(figures_of(output))
    assert output.strip()


def test_yaml_example_prints_what_the_callbacks_logged():
    assert "vne/net.fc/entropy" in run(EXAMPLES / "von_neumann_yaml.py")


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


def test_notebooks_open_with_a_title():
    first = {script.stem: jupytext.read(script.with_suffix(".ipynb")).cells[0] for script in NOTEBOOKS}
    assert [name for name, cell in first.items() if not cell.source.startswith("# ")] == []


@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda script: script.stem)
def test_notebook_needs_no_file_beside_it_and_installs_what_it_imports(script):
    source = script.read_text(encoding="utf-8")
    beside = {path.stem for path in EXAMPLES.glob("*.py")}
    assert not imported_names(source) & beside
    assert "__file__" not in source
    cells = [cell for cell in jupytext.read(script.with_suffix(".ipynb")).cells if cell.cell_type == "code"]
    assert cells[0].source.startswith("%pip install --quiet 'lightning-plugins[")
    packages = {
        "lightning": "lightning,",  # the package needs only its other name, pytorch_lightning
        "timm": "timm",
        "sklearn": "scikit-learn",
        "scipy": "scipy",
        "transformers": "huggingface",
        "lightning_plugins.plots": "plots",
    }
    for module, package in packages.items():
        named = re.search(rf"^from {module}\b|^import {module}\b", source, re.MULTILINE)
        assert not named or package in cells[0].source or (module == "sklearn" and "search" in cells[0].source)


@pytest.mark.parametrize(
    ("install", "brought", "missing"),
    [
        ("'lightning-plugins[plots]'", {"matplotlib"}, {"captum", "sklearn", "timm"}),
        ("'lightning-plugins[plots,attribution]'", {"matplotlib", "captum", "sklearn"}, {"timm"}),
        ("'lightning-plugins[lightning]' scikit-learn timm", {"sklearn", "timm"}, {"matplotlib", "captum"}),
    ],
)
def test_runs_without_an_installation_hide_what_the_first_cell_does_not_bring(install, brought, missing, tmp_path):
    cells = [{"cell_type": "markdown", "source": ["# A"]}, {"cell_type": "code", "source": ["%pip install --quiet "]}]
    cells[1]["source"].append(install)
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    hidden = tool("notebook_runs").missing_for(tmp_path / "a.ipynb", tool("check_wheel").EXTRAS)
    assert missing <= set(hidden)
    assert not brought & set(hidden)


@pytest.mark.slow
@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda script: script.stem)
def test_notebook_runs_in_an_empty_folder_and_shows_its_figures(script, monkeypatch, tmp_path):
    # pip finds everything installed, and must not change the environment; the package is the installed one
    for name, value in {**SHORT, "PIP_NO_INDEX": "1", "IPYTHONDIR": str(tmp_path / "ipython")}.items():
        monkeypatch.setenv(name, value)
    notebook = jupytext.read(script.with_suffix(".ipynb"))
    folder = tmp_path / "empty"
    folder.mkdir()
    nbclient.NotebookClient(notebook, timeout=HANGS, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    shown = sum("image/png" in output.get("data", {}) for output in outputs)
    assert shown == len(figures_of(printed)) == len(re.findall(r"^ *show\(", script.read_text(), re.MULTILINE))
