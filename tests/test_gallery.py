"""The gallery shows every example with outputs of its code, and nothing of the machine that they were made on."""

import base64
import io
import re
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from tests.test_docs import tool

ROOT = Path(__file__).parents[1]
gallery = tool("gallery")


def picture(width: int) -> bytes:
    written = io.BytesIO()
    Image.linear_gradient("L").resize((width, width // 2)).convert("RGB").save(written, "png")
    return written.getvalue()


def notebook(*code: str, text: str = "# Title\n\nWords."):
    cells = [nbformat.v4.new_code_cell(source) for source in ("%pip install --quiet x", *code)]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text), *cells])


def stream(text: str, name: str = "stdout"):
    return nbformat.v4.new_output("stream", name=name, text=text)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("examples", "executed", "gallery"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(gallery, "EXAMPLES", tmp_path / "examples")
    monkeypatch.setattr(gallery, "EXECUTED", tmp_path / "executed")
    return tmp_path


def write(path: Path, book) -> None:
    path.write_text(nbformat.writes(book), encoding="utf-8")


def executed(*code: str, outputs=()):
    book = notebook(*code)
    book.cells[-1].outputs = list(outputs)
    book.metadata["gallery"] = {"steps": 7, "processor_seconds": 3}
    return book


def test_kept_outputs_are_of_the_code_of_today_and_tell_nothing_of_a_machine():
    missing = {name for name in gallery.outdated() if not (gallery.EXECUTED / f"{name}.ipynb").exists()}
    assert [found for found in gallery.complaints() if found.partition(" has no outputs")[0] not in missing] == []


def test_index_leads_to_every_example_with_a_thumbnail():
    index = (ROOT / "docs" / "gallery" / "index.md").read_text(encoding="utf-8")
    names = {path.stem for path in (ROOT / "examples").glob("*.ipynb")}
    assert set(re.findall(r"\[!\[[^\]]+\]\(thumbnails/(\w+)\.png\)\]\(\1\.ipynb\)", index)) == names
    assert set(index.partition("```{toctree}")[2].split()) >= names


def test_outputs_stay_as_long_as_the_code_does(folders):
    drawn = nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(picture(90)).decode()})
    write(folders / "executed" / "a.ipynb", executed("print(1)", outputs=[stream("1\n"), drawn]))
    for text, code, shown in (("# Title", "print(1)", True), ("# Other", "print(1)", True), ("# Title", "1", False)):
        write(folders / "examples" / "a.ipynb", notebook(code, text=text))
        page = gallery.page("a")
        assert bool(page.cells[-1].outputs) == shown
        assert page.cells[0].source.startswith(text)
        assert ("`EXAMPLE_STEPS=7`, which took 3 seconds" in page.cells[0].source) == shown
        assert bool(gallery.complaints()) != shown
    write(folders / "examples" / "a.ipynb", notebook("print(1)"))
    gallery.write_pages(folders / "gallery")
    assert (folders / "gallery" / "thumbnails" / "a.png").read_bytes() == picture(90)
    write(folders / "examples" / "a.ipynb", notebook("print(2)"))
    gallery.write_pages(folders / "gallery")
    with Image.open(folders / "gallery" / "thumbnails" / "a.png") as empty:
        assert empty.size == (1, 1)


def test_results_are_what_was_printed_and_drawn_in_small_pictures():
    value = nbformat.v4.new_output("execute_result", {"text/plain": "3"})
    drawn = nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(picture(2000)).decode()})
    bar = nbformat.v4.new_output("display_data", {"text/plain": "100 %"})
    given = [stream("figure: /x/y.png\nacc 1\n"), stream("figure: z\n"), stream("w", "stderr"), value, drawn, bar]
    text, kept, small = gallery.results(given)
    assert (text.text, kept) == ("acc 1\n", value)
    with Image.open(io.BytesIO(base64.b64decode(small.data["image/png"]))) as image:
        assert (image.width, image.height, image.mode) == (800, 400, "P")


@pytest.mark.parametrize(
    "line", ["/tmp/a.png", "in /usr/lib/python3.11/site-packages/x.py", "x.py:3: UserWarning: no", "/home/me/data"]
)
def test_outputs_that_tell_of_the_machine_are_found(line, folders):
    write(folders / "examples" / "a.ipynb", notebook("f()"))
    write(folders / "executed" / "a.ipynb", executed("f()", outputs=[stream(f"fine: 1/2\n{line}\n")]))
    assert gallery.complaints() == [f"a.ipynb shows {line!r}"]
