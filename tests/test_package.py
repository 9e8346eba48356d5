"""The package as a whole: what its import loads, and that it needs no torchvision."""

import ast
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_plugins

PACKAGE = Path(lightning_plugins.__file__).parent

# Run before the import under test: what only the extras bring is neither on the path nor among the distributions.
HIDE_EXTRAS = """
import importlib.machinery, importlib.metadata, sys

HIDDEN = {
    "torchvision", "timm", "transformers", "matplotlib", "jsonargparse", "rich", "wandb", "tensorboard",
    "torch_pruning", "onnx", "onnxscript", "onnxruntime",
    "optuna", "captum", "torchao", "sklearn", "scipy", "safetensors",
}

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
from_name = importlib.metadata.Distribution.from_name

def without_extras(name):
    if name in HIDDEN:
        raise importlib.metadata.PackageNotFoundError(name)
    return from_name(name)

importlib.metadata.Distribution.from_name = without_extras
"""


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_version_is_the_installed_one():
    assert lightning_plugins.__version__ == importlib.metadata.version("lightning-plugins")


def test_import_loads_nothing_else():
    done = run(
        "import sys; before = set(sys.modules); import lightning_plugins; print(*sorted(set(sys.modules) - before))"
    )
    assert done.stdout.split() == ["lightning_plugins"], done.stderr


@pytest.mark.parametrize(
    "name", ["functional", "schedules", "selection", "distributed", "regularizers", "compression", "meta"]
)
def test_imports_beside_a_broken_torchvision(name, tmp_path):
    """A torchvision built for another torch raises on import; what needs no Lightning must not touch it.

    Lightning and torchmetrics import an installed torchvision themselves, so the rest fails with them.
    """
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    path = os.pathsep.join([str(tmp_path), str(PACKAGE.parent)])
    assert "operator torchvision::nms" in run("import torchvision", PYTHONPATH=path).stderr  # control: it is found
    done = run(f"import sys, lightning_plugins.{name}; print(*sys.modules)", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "torchvision" not in done.stdout.split()


@pytest.mark.parametrize(
    "name",
    ["callbacks", "cli", "compression", "data", "functional", "meta", "metrics", "mixins", "plots", "transforms"],
)
def test_imports_without_extras(name):
    done = run(f"{HIDE_EXTRAS}\nimport lightning_plugins.{name}; print(HIDDEN & set(sys.modules))")
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr


def test_names_imported_on_demand_say_which_extra_they_need():
    code = """
import lightning_plugins.search as search
for name in search.__all__:
    try:
        getattr(search, name)
    except ImportError as error:
        print(name, "lightning-plugins[search]" in str(error))
"""
    done = run(HIDE_EXTRAS + code)
    names = ["B2EASampler", "SharedTrial", "TercetPruner", "TuneResult", "origins", "shared_trials", "tune"]
    assert done.stdout.split("\n") == [*(f"{name} True" for name in names), ""], done.stderr


@pytest.mark.parametrize("name", ["torchvision", "matplotlib.pyplot"])
def test_hidden_extras_are_hidden(name):
    assert f"No module named '{name.partition('.')[0]}'" in run(f"{HIDE_EXTRAS}\nimport {name}").stderr


OWN = ("lightning_plugins.functional.", "lightning_plugins._checks.", "lightning_plugins._grouping.")


@pytest.mark.parametrize("path", sorted((PACKAGE / "functional").rglob("*.py")), ids=lambda path: path.stem)
def test_functional_imports_torch_alone(path):
    """Beside the standard library, itself, and the checks and groups of arguments, which import nothing else.

    The convex hull of hidden points has no equal in torch; that module imports SciPy, inside of its function only, as
    `test_imports_without_extras` holds.
    """
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            imported.add(node.module)
    strange = {
        name
        for name in imported
        if name.partition(".")[0] not in {"torch", *sys.stdlib_module_names}
        and (path.stem, name) != ("hidden_points", "scipy.spatial")
        and not f"{name}.".startswith(OWN)
    }
    assert strange == set()


MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports_of(name: str) -> set[str]:
    """The modules of this package that a module imports, at its top or inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_plugins"):
            found.update(
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in MODULES else node.module for a in node.names
            )
    return found


def owners(name: str) -> list[str]:
    """The packages that a module is private to: those in which a segment of its name begins with an underscore."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts)) if parts[i].startswith("_")]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_private_modules_stay_in_their_room(name):
    """Mixins are Lightning's other front and share what callbacks keep to themselves."""
    home = name + "." if MODULES[name].name == "__init__.py" else name
    strange = {
        (other, owner)
        for other in imports_of(name)
        for owner in owners(other)
        if not home.startswith(f"{owner}.")
        and not (name.startswith("lightning_plugins.mixins.") and owner == "lightning_plugins.callbacks")
    }
    assert strange == set()


def test_no_import_goes_in_a_circle():
    waiting = {name: imports_of(name) - {name} for name in MODULES}
    while free := {name for name, needs in waiting.items() if not needs & waiting.keys()}:
        waiting = {name: needs for name, needs in waiting.items() if name not in free}
    assert waiting == {}


# One method, one module: these grow with the methods, and a room would only hide them.
BY_METHOD = {"callbacks", "functional", "metrics", "regularizers", "plots", "lightning_plugins"}


@pytest.mark.parametrize("room", sorted({path.parent for path in MODULES.values()}), ids=lambda room: room.name)
def test_rooms_are_small_and_say_what_they_are_for(room):
    files = [path for path in room.glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= 12 or room.name in BY_METHOD
    docstring = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8")))
    assert docstring
