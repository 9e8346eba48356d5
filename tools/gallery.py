"""The documentation's gallery: the notebooks under examples/ with their outputs.

    python tools/gallery.py                  # run those whose outputs are missing or belong to other code
    python tools/gallery.py linear_probe     # run these
    python tools/gallery.py --check          # say what is missing, too large, or tells of the machine; run nothing

The outputs are stored in docs/executed. `docs/conf.py` inserts them into the current notebooks as long as the code is
the same, so that texts can be improved without a run; if the code has changed, a page has no outputs until the next
run.
"""

import argparse
import base64
import getpass
import io
import os
import re
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES, EXECUTED = ROOT / "examples", ROOT / "docs" / "executed"
# EXAMPLE_STEPS of examples that take minutes on one core: with fewer steps, and some with one seed instead of three.
# Claims are checked only in full runs.
SHORTER = {
    "adapt_vit_glyphs": 30,
    "compress_sentence_encoder": 60,
    "glyph_few_shot": 20,
    "hybrid_compression": 12,
    "low_rank_compression": 46,
    "mutual_information": 200,
    "point_cloud_augmentation": 60,
    "search_own_knobs": 6,
    "sinusoid_regression": 600,
    "stable_rank_callback": 115,
    "von_neumann_self_supervised": 150,
}
WIDTH, COLOURS = 800, 64
LARGEST = 2_000_000  # bytes, in total
NO_PICTURE = base64.b64decode(  # one grey point, for a page without outputs
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGN4AgAA5gDlWNqJzgAAAABJRU5ErkJggg=="
)
PRIVATE = re.compile(r"/(tmp|work|root|home|usr|opt|var)/|site-packages|\.venv|Warning\b")


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def same_code(one: Any, other: Any) -> bool:
    """True if two notebooks have the same code, except for installations."""
    return [cell.source for cell in code_cells(one)[1:]] == [cell.source for cell in code_cells(other)[1:]]


def pictures(notebook: Any) -> list[bytes]:
    """The figures of a notebook, as PNG."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [base64.b64decode(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})]


def note(metadata: dict[str, Any]) -> str:
    """A sentence about the run that produced the outputs."""
    took = f"{metadata['processor_seconds']} seconds of processor time"
    if metadata["steps"] is None:
        return f"*The outputs are those of the notebook as it stands, which took {took}.*"
    return (
        f"*The outputs are those of a shorter run, with `EXAMPLE_STEPS={metadata['steps']}`, which took {took}: curves "
        "and tables look alike, but the claim is for the notebook as it stands.*"
    )


def page(name: str) -> Any:
    """The notebook of an example, with the outputs of its last run if the code is the same."""
    notebook, executed = read(EXAMPLES / f"{name}.ipynb"), EXECUTED / f"{name}.ipynb"
    if not executed.exists():
        return notebook
    ran = read(executed)
    if not same_code(notebook, ran):
        return notebook
    for cell, shown in zip(code_cells(notebook), code_cells(ran), strict=True):
        cell.outputs, cell.execution_count = shown.outputs, shown.execution_count
    first = notebook.cells[0]
    title, _, rest = first.source.partition("\n")
    first.source = f"{title}\n\n{note(ran.metadata.gallery)}\n{rest}"
    return notebook


def write_pages(folder: Path) -> None:
    """Fill docs/gallery with the pages and, for the index, the first picture of each."""
    (folder / "thumbnails").mkdir(exist_ok=True)
    for example in sorted(EXAMPLES.glob("*.ipynb")):
        notebook = page(example.stem)
        thumbnail = (*pictures(notebook), NO_PICTURE)[0]
        files = {
            folder / example.name: nbformat.writes(notebook).encode(),
            folder / "thumbnails" / f"{example.stem}.png": thumbnail,
        }
        for target, content in files.items():
            if not target.exists() or target.read_bytes() != content:
                target.write_bytes(content)


def smaller(picture: bytes) -> bytes:
    """A figure with few colours, at most as wide as a page."""
    from PIL import Image

    with Image.open(io.BytesIO(picture)) as opened:
        image = opened.convert("RGB")
    if image.width > WIDTH:
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
    written = io.BytesIO()
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(written, "png", optimize=True)
    return written.getvalue()


def results(outputs: list[Any]) -> list[Any]:
    """The relevant outputs of a cell, without progress bars and warnings."""
    kept = []
    for output in outputs:
        if "image/png" in output.get("data", {}):
            drawn = smaller(base64.b64decode(output.data["image/png"]))
            output.data = {"image/png": base64.b64encode(drawn).decode()}
            output.metadata = {}
        elif output.get("name") == "stdout":
            lines = [line for line in output.text.splitlines(True) if not line.startswith("figure: ")]
            output.text = "".join(lines)
            if not output.text.strip():
                continue
        elif output.output_type != "execute_result":
            continue
        kept.append(output)
    return kept


def execute(name: str) -> None:
    """Run a notebook in an empty folder and store its results."""
    import nbclient

    notebook, steps = read(EXAMPLES / f"{name}.ipynb"), SHORTER.get(name)
    os.environ.pop("EXAMPLE_STEPS", None)
    if steps is not None:
        os.environ["EXAMPLE_STEPS"] = str(steps)
    os.environ["PYTHONPATH"] = str(ROOT)
    install, began = code_cells(notebook)[0], os.times()
    text, install.source = install.source, ""  # all is there, and the package is the clone's
    with tempfile.TemporaryDirectory() as folder:
        nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": folder}}).execute()
    install.source, ended = text, os.times()
    for cell in code_cells(notebook):
        cell.outputs, cell.metadata = results(cell.outputs), {}
    used = ended.children_user - began.children_user + ended.children_system - began.children_system
    notebook.metadata["gallery"] = {"steps": steps, "processor_seconds": round(used)}
    EXECUTED.mkdir(exist_ok=True)
    (EXECUTED / f"{name}.ipynb").write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    print(f"{name} ran in {ended.elapsed - began.elapsed:.0f} s, {used:.0f} s of processor time", flush=True)


def told(notebook: Any) -> list[str]:
    """Lines of the outputs that identify the machine or contain warnings."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    names = [name for name in (socket.gethostname(), getpass.getuser()) if len(name) > 4]
    lines = [line for text in texts for line in text.splitlines()]
    return [line for line in lines if PRIVATE.search(line) or any(name in line for name in names)]


def outdated() -> list[str]:
    """Names of examples without outputs, or with outputs of other code."""
    names = [example.stem for example in sorted(EXAMPLES.glob("*.ipynb"))]
    return [
        name
        for name in names
        if not (EXECUTED / f"{name}.ipynb").exists()
        or not same_code(read(EXAMPLES / f"{name}.ipynb"), read(EXECUTED / f"{name}.ipynb"))
    ]


def complaints() -> list[str]:
    """Complaints about the stored outputs."""
    kept = sorted(EXECUTED.glob("*.ipynb"))
    found = [f"{name} has no outputs of its code: run tools/gallery.py {name}" for name in outdated()]
    found += [f"{path.name} has no example" for path in kept if not (EXAMPLES / path.name).exists()]
    found += [f"{path.name} shows {line!r}" for path in kept for line in told(read(path))]
    found += [f"{path.name} shows nothing" for path in kept if not any(cell.outputs for cell in code_cells(read(path)))]
    size = sum(path.stat().st_size for path in kept)
    if size > LARGEST:
        found.append(f"the outputs take {size} bytes, more than {LARGEST}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--check", action="store_true", help="run nothing")
    options = parser.parse_args()
    began = time.perf_counter()
    for name in [] if options.check else options.names or outdated():
        execute(name)
    found = complaints()
    print("\n".join(found), file=sys.stderr)
    print(f"{len(found)} complaints, {time.perf_counter() - began:.0f} s")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
