"""The programs in README.md and the guide run as they stand; the tools of the documentation find what is wrong."""

import importlib.util
import re
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md")), ROOT / "docs/coming_from/learn2learn.md"]
PAGES = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def programs(page: Path) -> list[str]:
    found = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [text for text in found if "fit(model, data)" not in text]  # stands for the reader's own


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_programs_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for number, program in enumerate(programs(page)):
        exec(compile(program, f"{page.name}[{number}]", "exec"), names)
    assert programs(page)


def test_first_program_of_the_readme_is_the_guides():
    (started,) = programs(ROOT / "docs" / "guide" / "start.md")
    assert tool("check_wheel").first_program("lightning.pytorch") == started


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<p id="here"></p><a href="b.html#there">1</a><a href="#here">2</a>')
    (tmp_path / "b.html").write_text(
        '<p id="there"></p><a href="a.html#gone">3</a><img src="c.png"><a href="x:y">4</a>'
    )
    found = sorted(tool("check_links").broken(tmp_path))
    assert found == [
        "b.html: a.html#gone names a place that does not exist",
        "b.html: c.png does not exist",
    ]


def wheel_of(folder: Path, *names: str) -> Path:
    path = folder / "lightning_plugins-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as opened:
        for name in names:
            opened.writestr(name, "")
    return path


def test_contents_of_archives_are_checked(tmp_path):
    check = tool("check_wheel")
    modules = [str(path.relative_to(ROOT)) for path in (ROOT / "lightning_plugins").rglob("*.py")]
    good = [*modules, "lightning_plugins/py.typed", "lightning_plugins-0.dist-info/licenses/LICENSE"]
    assert check.complaints(wheel_of(tmp_path, *good)) == []
    found = check.complaints(wheel_of(tmp_path, *good[1:-1], "tests/test_a.py", "examples/a.py"))
    assert len(found) == 5  # a module, the license, tests, and twice a file that is no part of the package
    assert any("has no LICENSE" in complaint for complaint in found)
    assert any(complaint.endswith(f"lacks {good[0]}") for complaint in found)

    sdist = tmp_path / "a-0.tar.gz"
    (tmp_path / "f").touch()
    with tarfile.open(sdist, "w:gz") as opened:
        for name in ("LICENSE", "lightning_plugins/py.typed", "tests/conftest.py"):
            opened.add(tmp_path / "f", f"a-0/{name}")
    assert check.complaints(sdist) == ["a-0.tar.gz holds tests/conftest.py"]


def test_citation_has_every_paper_that_a_card_is_about():
    cited = set(re.findall(r"arXiv:([\d.]+)", (ROOT / "CITATION.cff").read_text(encoding="utf-8")))
    for card in (ROOT / "docs" / "methods").glob("*.md"):
        head = card.read_text(encoding="utf-8").partition("\n## ")[0]
        assert set(re.findall(r"arxiv\.org/abs/(\d+\.\d+)", head)) <= cited, card.name
