"""Write a notebook beside every script under examples/ that has `# %%` cells; with --check only compare.

python tools/notebooks.py --execute linear_probe     # run notebooks to their ends, for the documentation's gallery
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import jupytext
import nbclient
import nbformat

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES, EXECUTED = ROOT / "examples", ROOT / "docs" / "executed"


def notebook_of(script: Path) -> str:
    """The notebook's text: no outputs, and numbered cells, so that the same script gives the same bytes."""
    notebook = jupytext.read(script)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat_minor = 5
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell["metadata"] = {}
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def is_result(output: dict[str, Any]) -> bool:
    """True for results that a reader wants to see: printed, drawn, or the value of a cell."""
    return (
        output.get("name") == "stdout"
        or output["output_type"] == "execute_result"
        or "image/png" in output.get("data", {})
    )


def execute(name: str) -> None:
    """Run a notebook in an empty folder and keep what it printed and drew; progress bars and warnings go."""
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    os.environ.pop("EXAMPLE_STEPS", None)
    with tempfile.TemporaryDirectory() as folder:
        nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": folder}}).execute()
    for number, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        shown = [output for output in cell.outputs if is_result(output)]
        for output in shown:
            if output.get("name") == "stdout":
                lines = [line for line in output["text"].splitlines(True) if not line.startswith("figure: ")]
                output["text"] = "".join(lines)
        cell["outputs"] = [output for output in shown if number and output.get("text") != ""]
        cell["metadata"] = {}
    EXECUTED.mkdir(exist_ok=True)
    (EXECUTED / f"{name}.ipynb").write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    print(f"{name} was executed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    parser.add_argument("--execute", nargs="+", metavar="NAME", help="run these notebooks for the gallery, in full")
    options = parser.parse_args()
    check = options.check
    if options.execute:
        for name in options.execute:
            execute(name)
        return 0

    scripts = [path for path in sorted(EXAMPLES.glob("*.py")) if "\n# %%" in f"\n{path.read_text(encoding='utf-8')}"]
    complaints = [
        f"{path.name} has no script"
        for path in sorted(EXAMPLES.glob("*.ipynb"))
        if path.with_suffix(".py") not in scripts
    ]
    for script in scripts:
        target, text = script.with_suffix(".ipynb"), notebook_of(script)
        if not check:
            target.write_text(text, encoding="utf-8")
        elif not target.exists() or target.read_text(encoding="utf-8") != text:
            complaints.append(f"{target.name} differs from {script.name}: run `make notebooks`")
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    print(f"{len(scripts)} notebooks {'compared with their scripts' if check else 'written'}")
    return bool(complaints)


if __name__ == "__main__":
    sys.exit(main())
