"""Plant small faults in the package, one after the other, and see whether the tests that mirror the module notice.

Usage::

    python tools/mutants.py run --count 120 --seconds 1800     # goes on from docs/benchmarks/mutation.json
    python tools/mutants.py page                               # writes docs/benchmarks/mutation.md from it
    python tools/mutants.py explain NUMBER "why no test can notice"

The faults are drawn by a seed, in turns from every operator and every folder of the package, so that a run that is
cut short is spread as evenly as one that is not. Each is planted in a copy of the checkout. A test that fails with the
fault is run again without it: only if it passes there has it noticed something. Tests marked `slow` or `distributed`
are left out, and so are the docstrings' examples.
"""

import argparse
import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from mutation_operators import OPERATORS, Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, SEED, MOST_FILES, PATIENCE = "lightning_plugins", 0, 5, 120
RESULTS = ROOT / "docs" / "benchmarks" / "mutation.json"
PAGE = ROOT / "docs" / "benchmarks" / "mutation.md"
COPIED = (PACKAGE, "tests", "tools", "examples", "benchmarks", "docs")
NOTICED = ("failed", "timeout", "broken")


def folder_of(path: str) -> str:
    """The folder of the package that a file is in; the file's own name at the top."""
    parts = Path(path).parts
    return parts[1] if len(parts) > 2 else "top level"


def drawn(root: Path, seed: int) -> list[Mutant]:
    """All faults of the package, in the order in which they are planted.

    Args:
        root: The checkout.
        seed: Shuffles them.

    Returns:
        The faults: in turns from every operator, and within an operator from every folder.
    """
    cells: dict[tuple[str, str], list[Mutant]] = {}
    for file in sorted((root / PACKAGE).rglob("*.py")):
        path = file.relative_to(root).as_posix()
        for mutant in mutants_of(path, file.read_text(encoding="utf-8")):
            cells.setdefault((mutant.operator, folder_of(path)), []).append(mutant)
    generator = random.Random(seed)
    for cell in cells.values():
        generator.shuffle(cell)
    by_operator = {operator: [key for key in sorted(cells) if key[0] == operator] for operator in OPERATORS}
    for keys in by_operator.values():
        generator.shuffle(keys)
    order: list[Mutant] = []
    turn = 0
    while any(cells.values()):
        for keys in by_operator.values():
            left = [key for key in keys if cells[key]]
            if left:
                order.append(cells[left[turn % len(left)]].pop())
        turn += 1
    return order


def public_names(source: str) -> list[str]:
    """Names of the functions and classes that a module defines."""
    kinds = ast.FunctionDef | ast.ClassDef
    return [node.name for node in ast.parse(source).body if isinstance(node, kinds)]


def namesakes(file: Path) -> set[str]:
    """Names that a test file of a module may have."""
    stem = file.stem.lstrip("_")
    return {f"test_{stem}", f"test_{file.parent.name}_{stem}"}


def mirrors(root: Path, path: str) -> list[str]:
    """Test files of a module: its namesake, those that import it or use its names, and its users' namesakes.

    Args:
        root: The checkout.
        path: The module's file.

    Returns:
        At most `MOST_FILES` files, the nearest first.
    """
    file, folder = root / path, folder_of(path)
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    names = public_names(file.read_text(encoding="utf-8"))
    users = [other for other in (root / PACKAGE).rglob("*.py") if module in other.read_text(encoding="utf-8")]
    of_users = set().union(*map(namesakes, users)) if users else set()
    ranked = []
    for test in (root / "tests").rglob("test_*.py"):
        text = test.read_text(encoding="utf-8")
        known = sum(bool(re.search(rf"\b{name}\b", text)) for name in names)
        imports = bool(re.search(rf"\b{re.escape(module)}\b", text))
        score = 8 * (test.stem in namesakes(file)) + 4 * imports + 2 * min(known, 3) + 5 * (test.stem in of_users)
        if score:
            ranked.append((-score, folder not in test.parts, len(text), test.relative_to(root).as_posix()))
    return [name for *_, name in sorted(ranked)[:MOST_FILES]]


class Tests:
    """Runs tests of a checkout in a process of their own, up to the first failure.

    Args:
        seconds: Computing time after which tests count as hanging.
        heavy: Whether what most tests import is imported once for all of them.
    """

    def __init__(self, seconds: int, *, heavy: bool = True) -> None:
        self.seconds = seconds
        command = [sys.executable, str(Path(__file__).with_name("mutation_server.py")), *["--heavy"] * heavy]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._server = subprocess.Popen(command, env=environment, **pipes)

    def __enter__(self) -> "Tests":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()

    def __call__(self, root: Path, tests: list[str]) -> tuple[str, list[str]]:
        """Run files, or single tests.

        Returns:
            ``"passed"``, ``"failed"``, ``"timeout"``, ``"broken"`` or ``"none"``, and the tests that failed.
        """
        print(
            json.dumps({"root": str(root), "tests": tests, "seconds": self.seconds}),
            file=self._server.stdin,
            flush=True,
        )
        code, text = json.loads(self._server.stdout.readline())
        outcome = {None: "timeout", 0: "passed", 1: "failed", 4: "none", 5: "none"}.get(code, "broken")
        return outcome, re.findall(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - .*)?$", text, re.MULTILINE)


def plant(copy: Path, mutant: Mutant, tests: list[str], run_tests: Tests) -> dict[str, Any]:
    """Plant a fault in a copy of the checkout, and see what the tests say.

    Args:
        copy: The copy, whole before and afterwards.
        mutant: The fault.
        tests: The test files.
        run_tests: Runs them.

    Returns:
        The outcome, the tests that noticed, and the time.
    """
    if not tests:
        return {"outcome": "none", "by": [], "seconds": 0.0}
    began, file = time.monotonic(), copy / mutant.path
    source = file.read_text(encoding="utf-8")
    wrong: list[str] = []  # that fail without the fault too
    while True:
        file.write_text(mutant.applied(source), encoding="utf-8")
        try:
            outcome, failed = run_tests(copy, [*tests, *(f"--deselect={name}" for name in wrong)])
        finally:
            file.write_text(source, encoding="utf-8")
        if outcome != "failed" or not failed or run_tests(copy, failed)[0] == "passed":
            return {"outcome": outcome, "by": failed, "seconds": round(time.monotonic() - began, 1)}
        wrong += failed


def load(path: Path) -> dict[str, Any]:
    """The results so far."""
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    return {"seed": SEED, "results": []}


def save(path: Path, state: dict[str, Any]) -> None:
    """Write the results at once or not at all."""
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def run(root: Path, results: Path, count: int, seconds: float, *, heavy: bool = True) -> dict[str, Any]:
    """Plant faults that were not planted before.

    Args:
        root: The checkout.
        results: The JSON file to go on from, replaced after every fault.
        count: The number of faults to have in it.
        seconds: After so long no other fault is planted.
        heavy: As for `Tests`.

    Returns:
        The results.
    """
    state, began = load(results), time.monotonic()
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    commit = revision.stdout.strip()
    known = {result["name"] for result in state["results"]}
    with tempfile.TemporaryDirectory() as folder, Tests(PATIENCE, heavy=heavy) as run_tests:
        copy = Path(folder)
        for name in COPIED:
            if (root / name).exists():
                shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("_build", "__pycache__"))
        for file in root.glob("*.*"):
            if file.is_file():
                shutil.copy(file, copy)
        for mutant in drawn(copy, state["seed"]):
            if len(state["results"]) >= count or time.monotonic() - began > seconds:
                break
            if mutant.name in known:
                continue
            tests = mirrors(copy, mutant.path)
            found = plant(copy, mutant, tests, run_tests)
            shown = {key: getattr(mutant, key) for key in ("name", "path", "line", "operator", "before", "after")}
            state["results"].append({**shown, "tests": tests, **found, "commit": commit, "note": ""})
            save(results, state)
            print(
                f"{len(state['results'])} {found['outcome']}: {mutant.path}:{mutant.line} {mutant.operator}", flush=True
            )
    return state


def table(results: list[dict[str, Any]], key: Any, title: str) -> list[str]:
    """Lines of a table that counts outcomes by some key."""
    planted, noticed = Counter(map(key, results)), Counter(key(r) for r in results if r["outcome"] in NOTICED)
    rows = [f"| {name} | {planted[name]} | {noticed[name]} |" for name in sorted(planted)]
    return [f"| {title} | planted | noticed |", "|---|---|---|", *rows, ""]


def page(state: dict[str, Any]) -> str:
    """The page of all results, with every fault that no test noticed."""
    results = state["results"]
    noticed = sum(result["outcome"] in NOTICED for result in results)
    outcomes = Counter(result["outcome"] for result in results)
    lived = [(i, result) for i, result in enumerate(results, 1) if result["outcome"] not in NOTICED]
    share = f" ({noticed / len(results):.0%})" if results else ""
    explained = sum(bool(result["note"]) for _, result in lived)
    details = ", ".join(f"{number} {name}" for name, number in sorted(outcomes.items()))
    lines = [
        "# Planted faults",
        "",
        "Written by `tools/mutants.py page`. Small faults are planted in the package, in turns from every operator and",
        "folder, and the tests that mirror the module are run, without those marked `slow` or `distributed`. Of",
        f"{len(results)} faults, drawn with seed {state['seed']}, the tests noticed **{noticed}**{share}.",
        "",
        f"In detail: {details}. A test counts only if it passes without the fault.",
        "*Timeout*: tests hang with the fault; *broken*: they cannot be collected; both are noticed. *None*: no test",
        "file was found.",
        "",
        *table(results, lambda result: result["operator"], "operator"),
        *table(results, lambda result: folder_of(result["path"]), "folder"),
        f"## Not noticed: {len(lived)}, of which {explained} are explained",
        "",
        "| | place | before | after | why |",
        "|---|---|---|---|---|",
    ]
    for number, result in lived:
        before, after = (" ".join(result[key].split()).replace("|", "\\|")[:80] for key in ("before", "after"))
        place = f"`{result['path'].removeprefix(PACKAGE + '/')}`, line {result['line']}"
        lines.append(f"| {number} | {place} | `{before}` | `{after}` | {result['note'] or 'open'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    planting = commands.add_parser("run")
    planting.add_argument("--count", type=int, default=100)
    planting.add_argument("--seconds", type=float, default=3600.0)
    commands.add_parser("page")
    explaining = commands.add_parser("explain")
    explaining.add_argument("number", type=int)
    explaining.add_argument("why")
    given = parser.parse_args()
    if given.command == "run":
        run(ROOT, RESULTS, given.count, given.seconds)
    state = load(RESULTS)
    if given.command == "explain":
        state["results"][given.number - 1]["note"] = given.why
        save(RESULTS, state)
    PAGE.write_text(page(state), encoding="utf-8")


if __name__ == "__main__":
    main()
