"""Find the tests that are nearest to a place in the package."""

import ast
import re
from pathlib import Path

PACKAGE, MOST_FILES = "lightning_plugins", 5


def folder_of(path: str) -> str:
    """The folder of the package that a file is in; the file's own name at the top."""
    parts = Path(path).parts
    return parts[1] if len(parts) > 2 else "top level"


def public_names(source: str) -> list[str]:
    """Names of the functions and classes that a module defines."""
    kinds = ast.FunctionDef | ast.ClassDef
    return [node.name for node in ast.parse(source).body if isinstance(node, kinds)]


def namesakes(file: Path) -> set[str]:
    """Names that a test file of a module may have."""
    stem = file.stem.lstrip("_")
    return {f"test_{stem}", f"test_{file.parent.name}_{stem}"}


def definition_at(source: str, line: int) -> str:
    """Name of the function or class of a module that a line is in; empty outside of all."""
    kinds = ast.FunctionDef | ast.ClassDef
    found = [node.name for node in ast.parse(source).body if isinstance(node, kinds) and node.lineno <= line]
    return found[-1] if found else ""


def users_of(root: Path, path: str) -> dict[Path, str]:
    """Modules of the package that import a module, with their texts."""
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    package, _, own = module.rpartition(".")
    imported = re.compile(rf"\b{re.escape(module)}\b|from {re.escape(package)} import .*\b{own}\b")
    texts = {other: other.read_text(encoding="utf-8") for other in (root / PACKAGE).rglob("*.py")}
    return {other: text for other, text in texts.items() if imported.search(text)}


def mirrors(root: Path, path: str, line: int = 0) -> list[str]:
    """Test files of a module: its namesake, those that import it or use its names, and those of its users.

    Args:
        root: The checkout.
        path: The module's file.
        line: Where the fault is: what uses the function or class around it is nearer than what uses the module.

    Returns:
        At most twice `MOST_FILES` files, the nearest first.
    """
    file, folder = root / path, folder_of(path)
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    source = file.read_text(encoding="utf-8")
    names, around = public_names(source), definition_at(source, line)
    users = users_of(root, path)
    named = around and not around.startswith("_")  # a private one is used through any public one
    near = {other: text for other, text in users.items() if (_has(text, around) if named else around)}
    of_users, of_near = ({name for other in some for name in namesakes(other)} for some in (users, near))
    theirs = {name for text in near.values() for name in public_names(text) if not name.startswith("_")}
    ranked = []
    for test in (root / "tests").rglob("test_*.py"):
        text = test.read_text(encoding="utf-8")
        if test.stem == "test_mutants":  # names places of the package, and tests none
            continue
        known = sum(_has(text, name) for name in names)
        score = 8 * (test.stem in namesakes(file)) + 4 * _has(text, module) + 2 * min(known, 3)
        score += 5 * (test.stem in of_users) + 4 * (test.stem in of_near) + 4 * bool(around and _has(text, around))
        score += 2 * any(_has(text, name) for name in theirs)
        if score:
            ranked.append((-score, folder not in test.parts, len(text), test.relative_to(root).as_posix()))
    return [name for *_, name in sorted(ranked)[: 2 * MOST_FILES]]


def _has(text: str, name: str) -> bool:
    return bool(re.search(rf"\b{re.escape(name)}\b", text))
