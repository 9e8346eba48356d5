"""Write a notebook for every script under examples/ with `# %%` cells; with --check only compare."""

import argparse
import sys
from pathlib import Path

import jupytext
import nbformat

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def notebook_of(script: Path) -> str:
    """The notebook's text, without outputs and with numbered cells, so that the same script gives the same bytes."""
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    check = parser.parse_args().check

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
