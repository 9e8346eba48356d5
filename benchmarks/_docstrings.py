"""Texts for the benchmarks: docstrings of installed packages, read from files without importing them.

Training and calibration texts come from other packages than test texts.
"""

import ast
import importlib.util
import random
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

TRAINING = ("numpy", "pandas", "networkx", "sklearn")
TEST = ("scipy", "matplotlib", "sqlalchemy", "setuptools", "docutils", "click")


class Paragraph(NamedTuple):
    """The first sentence of a docstring paragraph, and the rest of it."""

    sentence: str
    rest: str


@cache
def paragraphs(packages: tuple[str, ...], least: int = 60) -> list[Paragraph]:
    """All paragraphs of prose in docstrings whose first sentence ``least`` characters or more follow; each once."""
    found: dict[str, Paragraph] = {}
    for package in packages:
        for file in sorted(_folder(package).rglob("*.py")):
            if {"tests", "test"}.isdisjoint(file.parts):
                for block in _blocks(file):
                    sentence, _, rest = block.partition(". ")
                    if len(sentence) >= 15 and len(rest) >= least:
                        found.setdefault(sentence, Paragraph(f"{sentence}.", rest))
    return list(found.values())


def retrieval_set(count: int, seed: int, packages: tuple[str, ...] = TEST) -> list[Paragraph]:
    """Paragraphs of the test packages, drawn by seed."""
    return random.Random(seed).sample(paragraphs(packages), count)


@cache
def training_texts(packages: tuple[str, ...] = TRAINING) -> list[str]:
    """All paragraphs of the training packages, in a fixed order."""
    texts = {
        block: None
        for package in packages
        for file in sorted(_folder(package).rglob("*.py"))
        for block in _blocks(file)
    }
    shuffled = list(texts)
    random.Random(0).shuffle(shuffled)
    return shuffled


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the benchmark's texts are docstrings of {package}, which is not installed")
    return Path(spec.submodule_search_locations[0])


def _blocks(file: Path) -> list[str]:
    """The paragraphs of prose in a file's docstrings, each on one line."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # templates of code, and files for other versions
        return []
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Module, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    blocks = [" ".join(block.split()) for text in texts if text for block in re.split(r"\n\s*\n", text)]
    return [block for block in blocks if _is_prose(block)]


def _is_prose(block: str) -> bool:
    if len(block) < 15 or block.startswith((">>>", "..", "Parameters", "Returns", "Args", ":", "*", "-", "@")):
        return False
    letters = sum(character.isalpha() or character == " " for character in block)
    return letters > 0.8 * len(block) and "---" not in block and "===" not in block
