"""The walk in CONTRIBUTING.md, done in a copy of the checkout: a module, its test and its card keep the contract."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```\w+ (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CONTRACT = (
    "tests/regularizers/test_hoyer_sparsity.py",
    "tests/regularizers/test_contract_terms.py",
    "tests/callbacks/test_terms.py",
    "tests/test_public_callbacks.py",
    "lightning_plugins/regularizers/hoyer_sparsity.py",
)


def copy_with_the_walk(folder: Path) -> None:
    for name in ("lightning_plugins", "tests", "docs/methods"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", folder)
    blocks = BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(blocks) == 3
    for path, text in blocks:
        (folder / path).write_text(text, encoding="utf-8")
    init = folder / "lightning_plugins" / "regularizers" / "__init__.py"
    text = init.read_text(encoding="utf-8")
    text = text.replace(
        "\n__all__ = [\n",
        "from lightning_plugins.regularizers.hoyer_sparsity import HoyerSparsity\n\n"
        '__all__ = [\n    "HoyerSparsity",\n',
    )
    init.write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_a_term_takes_one_module_its_test_and_its_card(tmp_path: Path):
    copy_with_the_walk(tmp_path)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not distributed"),
            *("-k", "HoyerSparsity or hoyer", *CONTRACT),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    passed = int(re.findall(r"(\d+) passed", done.stdout)[0])
    assert passed > 20  # value, derivatives, degenerate input, callback, YAML, resume, card, doctest


def test_the_walk_is_sound_python(tmp_path: Path):
    copy_with_the_walk(tmp_path)
    module = tmp_path / "lightning_plugins" / "regularizers" / "hoyer_sparsity.py"
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), str(module)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert len(module.read_text(encoding="utf-8").splitlines()) < 80
