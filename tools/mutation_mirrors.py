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


def mirrors(root: Path, path: str, line: int = 0) -> list[str]:
    """Test files of a module: its namesake, those that import it or use its names, and its users' namesakes.

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
    texts = {other: other.read_text(encoding="utf-8") for other in (root / PACKAGE).rglob("*.py")}
    users = [other for other, text in texts.items() if module in text]
    of_users = set().union(*map(namesakes, users)) if users else set()
    near = [other for other in users if around and re.search(rf"\b{around}\b", texts[other])]
    of_near = set().union(*map(namesakes, near)) if near else set()
    ranked = []
    for test in (root / "tests").rglob("test_*.py"):
        text = test.read_text(encoding="utf-8")
        known = sum(bool(re.search(rf"\b{name}\b", text)) for name in names)
        imports = bool(re.search(rf"\b{re.escape(module)}\b", text))
        score = 8 * (test.stem in namesakes(file)) + 4 * imports + 2 * min(known, 3) + 5 * (test.stem in of_users)
        score += 4 * (test.stem in of_near) + 4 * bool(around and re.search(rf"\b{around}\b", text))
        if score:
            ranked.append((-score, folder not in test.parts, len(text), test.relative_to(root).as_posix()))
    return [name for *_, name in sorted(ranked)[: 2 * MOST_FILES]]
