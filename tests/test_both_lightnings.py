"""Modules and Trainers of `pytorch_lightning`, in processes that import that package and not `lightning.pytorch`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_plugins._lightning import PACKAGE, other_package
from lightning_plugins.mixins import CompressionMixin, GAPMixin, MAMLMixin, StableRankMixin, VNEMixin

ROOT = Path(__file__).resolve().parents[1]

# As if `pip install pytorch-lightning` alone had been run.
HIDE_LIGHTNING = """
import importlib.abc, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lightning":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""

# Prints the messages of what a process of the one package says to classes of the other.
MIXED = """
import json, sys, warnings
warnings.simplefilter("ignore")
import {first}
from lightning_plugins._lightning import PACKAGE
from lightning_plugins.callbacks import EarlyTermination, HybridCompression, VNERegularization
from lightning_plugins.mixins import MAMLMixin, VNEMixin
import {other} as other
import {first} as own

def message(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__ + ": " + str(error)

def module_of(package):
    class Model(package.LightningModule):
        def training_step(self, batch, batch_idx):
            return None
        def validation_step(self, batch, batch_idx):
            return None
        def configure_optimizers(self):
            return None
    return Model()

def trainer_of(package, *callbacks):
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    return package.Trainer(accelerator="cpu", max_steps=1, callbacks=list(callbacks), **quiet)

def fit(package, module, *callbacks):
    return message(lambda: trainer_of(package, *callbacks).fit(module, [0]))

callbacks = dict(
    vne=VNERegularization("*", 0.1), early=EarlyTermination("x", history="h"), hybrid=HybridCompression("*", 0.5)
)
found = dict(package=PACKAGE)
for name, callback in callbacks.items():
    found[name] = fit(other, module_of(other), callback)
found["module"] = fit(own, module_of(other))
found["trainer"] = fit(other, module_of(own))
for mixin in (MAMLMixin, VNEMixin):
    found[mixin.__name__] = message(lambda: type("Model", (mixin, other.LightningModule), {{}}))
print(json.dumps(found))
"""


def run(*arguments: str) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_contract_where_only_pytorch_lightning_is_installed():
    program = "import runpy; runpy.run_module('tests.contract_other_lightning', run_name='__main__')"
    found = run("-c", f"{HIDE_LIGHTNING}\n{program}")
    assert len(found) > 25
    failed = {name: text for name, text in found.items() if text is not None}
    assert failed == {}, "\n".join(failed.values())


def test_lightning_is_hidden():
    done = subprocess.run(
        [sys.executable, "-c", f"{HIDE_LIGHTNING}\nimport lightning.pytorch"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "No module named 'lightning'" in done.stderr


@pytest.mark.parametrize(
    ("first", "other"),
    [("pytorch_lightning", "lightning.pytorch"), ("lightning.pytorch", "pytorch_lightning")],
)
def test_what_was_imported_is_taken_and_the_other_refused_by_name(first: str, other: str):
    found = run("-c", MIXED.format(first=first, other=other))
    assert found.pop("package") == first
    for name in ("vne", "early", "hybrid"):
        if pytorch_lightning.__version__.startswith("2.5"):  # its Trainer is the first to see the callback
            assert found[name] == "ValueError: Expected a parent"
            continue
        assert "MisconfigurationException: " in found[name]
        assert f"works with modules of `{first}`, got Model whose LightningModule comes from `{other}`" in found[name]
        assert f"this process uses `{first}`: change the imports to `import {first} as pl`" in found[name]
        assert f"or import `{other}` alone, before `lightning_plugins`" in found[name]
    for name in ("MAMLMixin", "VNEMixin"):
        assert f"TypeError: `{name}` works with modules of `{first}`, got Model whose" in found[name]
        assert f"comes from `{other}`; this process uses `{first}`" in found[name]
    # Of a module and a Trainer alone Lightning takes care, before any callback is asked.
    for name in ("module", "trainer"):
        assert found[name].startswith("TypeError: `model` must be a `LightningModule`")


@pytest.mark.parametrize("mixin", [VNEMixin, StableRankMixin, CompressionMixin, MAMLMixin, GAPMixin])
def test_mixins_refuse_the_other_package(mixin: type):
    with pytest.raises(TypeError, match=r"whose LightningModule comes from `pytorch_lightning`; this process uses"):
        type("Model", (mixin, pytorch_lightning.LightningModule), {})


def test_classes_of_the_other_package_are_told():
    assert PACKAGE == "lightning.pytorch"  # of this process, which imports both
    assert other_package(pytorch_lightning.LightningModule) == "pytorch_lightning"
    assert other_package(pytorch_lightning.Trainer) == "pytorch_lightning"
    for kind in (LightningModule, Trainer, torch.nn.Module, type("Trainer", (), {})):
        assert other_package(kind) is None


def test_a_folder_called_lightning_is_not_the_package(tmp_path: Path):
    """With `lightning` not installed, and a folder of that name beside the user's script."""
    (tmp_path / "lightning").mkdir()
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import importlib.machinery
finder = importlib.machinery.PathFinder.find_spec

def find_spec(name, path=None, target=None):
    if name == "lightning" and path is None:
        path = [{str(tmp_path)!r}]
    return finder(name, path, target)

importlib.machinery.PathFinder.find_spec = find_spec
import json
from lightning_plugins._lightning import PACKAGE
print(json.dumps(PACKAGE))
"""
    assert run("-c", code) == "pytorch_lightning"
