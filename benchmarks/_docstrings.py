"""Texts for the benchmarks: docstrings of installed packages, read from their files and never imported.

Packages are split: what a network is calibrated or trained on comes from other packages than what it is tested on.
"""

import ast
import importlib.util
import random
import re
from pathlib import Path
from typing import NamedTuple

TRAINING = ("numpy", "pandas", "networkx", "sympy", "torch", "sklearn", "transformers", "torchmetrics", "mpmath")
TEST = ("scipy", "matplotlib", "sqlalchemy", "docutils", "setuptools", "click", "werkzeug", "IPython", "pydantic")


class Paragraph(NamedTuple):
    """A docstring's first sentence, and the paragraph that follows it."""

    sentence: str
    rest: str


def paragraphs(packages: tuple[str, ...], *, least: int = 80) -> list[Paragraph]:
    """All docstrings with a summary and a paragraph of prose behind it; no summary or paragraph twice."""
    found, seen = [], set()
    for package in packages:
        for file in sorted(_folder(package).rglob("*.py")):
            if "tests" in file.parts or "test" in file.parts:
                continue
            for text in _docstrings(file):
                blocks = [" ".join(block.split()) for block in re.split(r"\n\s*\n", text)]
                prose = [block for block in blocks if _is_prose(block)]
                if len(prose) < 2 or prose[0] != blocks[0] or len(prose[1]) < least:
                    continue
                if prose[0] not in seen and prose[1] not in seen:
                    seen.update(prose[:2])
                    found.append(Paragraph(prose[0], prose[1]))
    return found


def retrieval_set(count: int, seed: int, packages: tuple[str, ...] = TEST) -> list[Paragraph]:
    """Paragraphs of the packages for tests, drawn anew for every seed."""
    return random.Random(seed).sample(paragraphs(packages), count)


def training_texts(count: int, seed: int, packages: tuple[str, ...] = TRAINING) -> list[str]:
    """Summaries and paragraphs of the packages for training, as single texts."""
    drawn = random.Random(seed)
    texts = [text for pair in paragraphs(packages, least=30) for text in pair]
    drawn.shuffle(texts)
    return texts[:count]


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the benchmark's texts are docstrings of {package}, which is not installed")
    return Path(spec.submodule_search_locations[0])


def _docstrings(file: Path) -> list[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # templates of code, and files for other versions
        return []
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Module, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in found if text]


def _is_prose(block: str) -> bool:
    if len(block) < 15 or block.startswith((">>>", "..", "Parameters", "Returns", "Args", ":", "*", "-", "@")):
        return False
    letters = sum(character.isalpha() or character == " " for character in block)
    return letters > 0.8 * len(block) and "---" not in block and "===" not in block
