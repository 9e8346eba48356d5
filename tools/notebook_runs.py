"""Run notebooks from empty folders, where only the packages installed by their first cells can be imported."""

import importlib.metadata
import json
import re
import resource
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Packages of every notebook: its kernel with dependencies.
KERNEL = ("ipykernel", "nbclient", "jupytext")
# Runs in the kernel before the first cell: hides extras that the first cell does not install.
HIDE = """
import sys
from importlib.machinery import PathFinder
class Rest:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else PathFinder.find_spec(name, path, target)
    @staticmethod
    def find_distributions(context):
        return (one for one in PathFinder.find_distributions(context) if one.name.lower() not in HIDDEN)
sys.meta_path = [Rest if finder is PathFinder else finder for finder in sys.meta_path]
"""
RUN = """
import json, sys, jupytext, nbclient, nbformat
name, hidden = sys.argv[1], sys.argv[2]
notebook = jupytext.read(name)
where = nbformat.v4.new_code_cell("import lightning_plugins; print(lightning_plugins.__file__)")
if hidden:  # with borrowed dependencies: instead of an installation, take away what it would not bring
    notebook.cells = [cell for cell in notebook.cells if not cell.source.startswith("%pip ")]
    notebook.cells.insert(0, nbformat.v4.new_code_cell(hidden))
notebook.cells.append(where)
try:
    nbclient.NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": "."}}).execute()
except nbclient.exceptions.CellExecutionError as error:
    sys.exit(f"{error.ename}: {error.evalue}")
if not where.outputs[0].text.startswith(sys.prefix):
    sys.exit(f"the notebook took the package from {where.outputs[0].text}")
"""


def processor_seconds() -> float:
    """The CPU time of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def wanted_by(name: str, extras: Collection[str], seen: dict[str, set[str]]) -> None:
    """Add a distribution, its extras and their dependencies to those seen, as far as installed."""
    from packaging.requirements import Requirement

    new = set(extras) - seen.get(name, set())
    if name in seen and not new:
        return
    seen.setdefault(name, set()).update(new)
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for line in lines:
        needed = Requirement(line)
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            wanted_by(normal(needed.name), needed.extras, seen)


def normal(name: str) -> str:
    """The normalised name of a distribution."""
    return re.sub(r"[-_.]+", "-", name).lower()


def missing_for(notebook: Path, extras: Collection[str]) -> list[str]:
    """The top-level modules that are not provided by the installations in a notebook's first cell."""
    from packaging.requirements import Requirement

    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    install = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    seen: dict[str, set[str]] = {}
    for word in (*install.removeprefix("%pip install --quiet ").split(), *KERNEL):
        needed = Requirement(word.strip("'"))
        wanted_by(normal(needed.name), needed.extras, seen)
    owners = importlib.metadata.packages_distributions()
    return [name for name in extras if not {normal(owner) for owner in owners.get(name, [name])} & set(seen)]


def run_notebooks(
    use: Callable[..., str], settings: dict[str, str], only: Collection[str] | None, extras: Collection[str]
) -> list[str]:
    """Run notebooks, each in a separate empty folder, and print the times.

    `use` runs Python there. With `extras`, the top-level modules of extras, nothing is installed, and a notebook sees
    only those that its first cell would install. Returns the names of failed notebooks.
    """
    notebooks = sorted(EXAMPLES.glob("*.ipynb"))
    if unknown := set(only or ()) - {notebook.stem for notebook in notebooks}:
        raise SystemExit(f"--only has no notebook of the name {', '.join(sorted(unknown))}")
    notebooks = [notebook for notebook in notebooks if only is None or notebook.stem in only]
    failed = []
    for notebook in notebooks:
        hidden = f"HIDDEN = {missing_for(notebook, extras)}\n{HIDE}" if extras else ""
        began, used = time.perf_counter(), processor_seconds()
        try:
            use("-c", RUN, str(notebook), hidden, **settings)
        except SystemExit as failure:
            failed.append(notebook.stem)
            print(f"{notebook.name} {failure}", file=sys.stderr)
        took = f"{time.perf_counter() - began:4.0f} s, {processor_seconds() - used:4.0f} s of processor time"
        print(f"{notebook.name:34} {took}{', FAILED' if notebook.stem in failed[-1:] else ''}", flush=True)
    print(f"{len(notebooks) - len(failed)} of {len(notebooks)} notebooks ran from an empty folder")
    return failed
