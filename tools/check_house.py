"""Check four house rules: openings of docstrings, numbers of parameters, lengths of files and of functions.

Usage::

    python tools/check_house.py            # this checkout
    python tools/check_house.py FOLDER     # another one, whose allowances are not counted as stale

Docstrings are checked everywhere; the three limits apply to the package, its tools and its examples. Exceptions are
listed in `ALLOWED` with the reason; an entry that is no longer needed is a complaint too.
"""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMITED = ("lightning_plugins", "tools", "examples")
FOLDERS = (*LIMITED, "benchmarks", "tests")
LIMITS = {"lines of a file": 300, "lines of a function": 40, "parameters": 9}
OPENING = re.compile(r"\s*(What|Which|Whether|How)\b")
Function = ast.FunctionDef | ast.AsyncFunctionDef
Allowances = Mapping[str, Mapping[str, str]]

ALLOWED: dict[str, dict[str, str]] = {
    "parameters": {
        "lightning_plugins/cli/_compress.py:compress": "every parameter is an option of the command line",
    },
}


@dataclass(frozen=True)
class Complaint:
    """A violation of a rule.

    Attributes:
        place: Path, followed by a colon and the name of a function or class.
        line: First line.
        kind: The exceeded limit, or "docstring".
        text: The complaint.
    """

    place: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        path, _, name = self.place.partition(":")
        return f"{path}:{self.line}: {name + ': ' if name else ''}{self.text}"


def definitions(tree: ast.AST, around: str = "") -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Classes and functions with their dotted names."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, Function | ast.ClassDef):
            name = f"{around}{child.name}"
            yield name, child
            yield from definitions(child, f"{name}.")
        else:
            yield from definitions(child, around)


def code_lines(function: Function) -> int:
    """Lines of a function's body, without its docstring; the parameter limit applies to the signature."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def parameters(function: Function) -> int:
    """Number of parameters a caller may pass by name or position."""
    given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return len([one for one in given if one.arg not in {"self", "cls"}])


def check_docstring(place: str, node: ast.Module | ast.ClassDef | Function) -> Iterator[Complaint]:
    """Complain about a docstring that opens with a question word."""
    text = ast.get_docstring(node, clean=False)
    if text is not None and (found := OPENING.match(text)):
        rule = f"a docstring opens with a verb or a noun phrase, not with {found[1]!r}"
        yield Complaint(place, node.body[0].lineno, "docstring", rule)


def check_file(path: Path, root: Path) -> Iterator[Complaint]:
    """Complaints about one file."""
    name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
    tree = ast.parse(text, filename=name)
    yield from check_docstring(name, tree)
    limited = name.startswith(tuple(f"{folder}/" for folder in LIMITED))
    counts = [(name, 1, "lines of a file", len(text.splitlines()))] if limited else []
    for qualified, node in definitions(tree):
        place = f"{name}:{qualified}"
        yield from check_docstring(place, node)
        if limited and isinstance(node, Function):
            counts.append((place, node.lineno, "lines of a function", code_lines(node)))
            counts.append((place, node.lineno, "parameters", parameters(node)))
    for place, line, kind, count in counts:
        if count > LIMITS[kind]:
            yield Complaint(place, line, kind, f"at most {LIMITS[kind]} {kind}, got {count}")


def check(root: Path, allowed: Allowances) -> list[Complaint]:
    """Complaints about a checkout, without allowed exceptions.

    Args:
        root: The checkout.
        allowed: Reasons by limit and place.

    Returns:
        The remaining complaints, in the order of the files.
    """
    files = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
    return [
        found for path in files for found in check_file(path, root) if found.place not in allowed.get(found.kind, {})
    ]


def stale(root: Path, allowed: Allowances) -> list[str]:
    """Exceptions that are no longer needed."""
    needed = {(found.kind, found.place) for found in check(root, {})}
    return [place for kind, places in allowed.items() for place in places if (kind, place) not in needed]


def main() -> int:
    other = len(sys.argv) > 1
    root = Path(sys.argv[1]).resolve() if other else ROOT
    complaints = [str(complaint) for complaint in check(root, ALLOWED)]
    if not other:
        complaints += [
            f"tools/check_house.py: {place!r} is allowed what it does not need" for place in stale(root, ALLOWED)
        ]
    print(*complaints, sep="\n", end="\n" if complaints else "")
    return bool(complaints)


if __name__ == "__main__":
    sys.exit(main())
