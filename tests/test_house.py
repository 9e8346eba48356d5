"""The check of the house's rules finds what breaks them, and lets pass what is allowed with a reason."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[1] / "tools" / "check_house.py"
spec = importlib.util.spec_from_file_location("check_house", TOOL)
house = importlib.util.module_from_spec(spec)
sys.modules["check_house"] = house  # dataclasses look for their module
spec.loader.exec_module(house)


def checkout(folder, text, path="lightning_plugins/part/module.py"):
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return folder


def complaints(root, allowed=None):
    return [str(found) for found in house.check(root, allowed or {})]


@pytest.mark.parametrize("word", ["What", "Which", "Whether", "How"])
@pytest.mark.parametrize(
    ("template", "line", "name"),
    [
        ('"""{} it is."""\n', 1, ""),
        ('class One:\n    """{} it is."""\n', 2, "One: "),
        ('class One:\n    def two(self):\n        """{} it is."""\n', 3, "One.two: "),
        ('if True:\n    async def two():\n        """\n        {} it is.\n        """\n', 3, "two: "),
    ],
    ids=["module", "class", "method", "branch"],
)
@pytest.mark.parametrize("folder", ["lightning_plugins", "tests"])
def test_openings_of_docstrings(tmp_path, word, template, line, name, folder):
    path = f"{folder}/a.py"
    rule = f"a docstring opens with a verb or a noun phrase, not with {word!r}"
    assert complaints(checkout(tmp_path, template.format(word), path)) == [f"{path}:{line}: {name}{rule}"]


def test_words_that_only_begin_alike_pass(tmp_path):
    text = '"""However it is."""\n\n\ndef f():\n    """Return what it is, whether and how."""\n    "What it says."\n'
    assert complaints(checkout(tmp_path, text)) == []


@pytest.mark.parametrize(
    ("signature", "count"),
    [
        ("self, a, b, c, d, e, f, g, h, i", None),
        ("self, a, /, b, c, d, e, *, f, g, h, i, j", 10),
        ("self, a, b, c, d, e, f, g, h, i, *args, **kwargs", None),
        ("cls, a, b, c, d, e, f, g, h, i, j=1, k=2", 11),
    ],
)
def test_numbers_of_parameters(tmp_path, signature, count):
    root = checkout(tmp_path, f"class One:\n    def two({signature}):\n        pass\n")
    expected = [f"lightning_plugins/part/module.py:2: One.two: at most 9 parameters, got {count}"]
    assert complaints(root) == (expected if count else [])


@pytest.mark.parametrize("lines", [40, 41])
def test_lengths_of_bodies_without_docstring_and_signature(tmp_path, lines):
    body = "    x = 1\n" * lines
    root = checkout(
        tmp_path, f'@decorated\ndef long(\n    a,\n):\n    """Return nothing.\n\n    More.\n    """\n{body}'
    )
    found = [f"lightning_plugins/part/module.py:2: long: at most 40 lines of a function, got {lines}"]
    assert complaints(root) == (found if lines > 40 else [])


@pytest.mark.parametrize("lines", [300, 301])
def test_lengths_of_files(tmp_path, lines):
    root = checkout(tmp_path, "x = 1\n" * lines)
    assert len(complaints(root)) == (lines > 300)
    assert complaints(checkout(tmp_path, "x = 1\n" * lines, "tests/long.py")) == complaints(root)


def test_an_allowance_is_for_one_limit_at_one_place(tmp_path):
    place = "lightning_plugins/part/module.py:long"
    root = checkout(tmp_path, f"def long({', '.join('abcdefghij')}):\n" + "    x = 1\n" * 50)
    assert len(complaints(root)) == 2
    (left,) = complaints(root, {"parameters": {place: "a reason"}})
    assert "at most 40 lines of a function, got 50" in left
    assert len(complaints(root, {"parameters": {place.partition(":")[0]: "a reason"}})) == 2


def test_allowances_that_nothing_needs_are_named(tmp_path):
    root = checkout(tmp_path, "x = 1\n" * 301)
    path = "lightning_plugins/part/module.py"
    assert house.stale(root, {"lines of a file": {path: "a reason"}}) == []
    assert house.stale(root, {"lines of a file": {"gone.py": "a reason"}, "parameters": {path: "a reason"}}) == [
        "gone.py",
        path,
    ]


def test_reasons_are_given_and_limits_known():
    for kind, places in house.ALLOWED.items():
        assert kind in house.LIMITS
        assert all(reason.strip() for reason in places.values())


def test_the_command_fails_on_a_complaint(tmp_path):
    def run(root):
        done = subprocess.run([sys.executable, str(TOOL), str(root)], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    assert run(checkout(tmp_path / "good", "x = 1\n")) == (0, "")
    code, text = run(checkout(tmp_path / "bad", '"""How."""\n'))
    assert code == 1
    assert text.startswith("lightning_plugins/part/module.py:1: a docstring opens")
