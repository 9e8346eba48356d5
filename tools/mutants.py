"""Plant small faults in the package, one after the other, and see whether the tests that mirror the module notice.

Usage::

    python tools/mutants.py run --count 120 --seconds 1800     # goes on from docs/benchmarks/mutation.json
    python tools/mutants.py again                              # plants those once more that lived
    python tools/mutants.py page                               # writes docs/benchmarks/mutation.md from it
    python tools/mutants.py explain NUMBER "why no test can notice"

The faults are drawn by a seed, in turns from every operator and every folder of the package, so that a run that is
cut short is spread as evenly as one that is not. Each is planted in a copy of the checkout. A test that fails with the
fault is run again without it: only if it passes there has it noticed something. If the nearest test files pass, their
tests of several processes are run, and the next files. Tests marked `slow` and the docstrings' examples are left out.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mutation_mirrors import MOST_FILES, PACKAGE, folder_of, mirrors
from mutation_operators import OPERATORS, Mutant, mutants_of
from mutation_page import NOTICED, page

ROOT = Path(__file__).resolve().parents[1]
SEED, PATIENCE = 0, 120
ALONE, TOGETHER = "not slow and not distributed", "distributed and not slow"
RESULTS = ROOT / "docs" / "benchmarks" / "mutation.json"
PAGE = ROOT / "docs" / "benchmarks" / "mutation.md"
COPIED = (PACKAGE, "tests", "tools", "examples", "benchmarks", "docs")


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

    def __call__(self, root: Path, tests: list[str], marks: str = ALONE) -> tuple[str, list[str]]:
        """Run files, or single tests, of what `marks` selects.

        Returns:
            ``"passed"``, ``"failed"``, ``"timeout"``, ``"broken"`` or ``"none"``, and the tests that failed.
        """
        request = {"root": str(root), "tests": ["-m", marks, *tests], "seconds": self.seconds}
        print(json.dumps(request), file=self._server.stdin, flush=True)
        code, text = json.loads(self._server.stdout.readline())
        outcome = {None: "timeout", 0: "passed", 1: "failed", 4: "none", 5: "none"}.get(code, "broken")
        return outcome, re.findall(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - .*)?$", text, re.MULTILINE)


def plant(copy: Path, mutant: Mutant, tests: list[str], run_tests: Tests, marks: str = ALONE) -> dict[str, Any]:
    """Plant a fault in a copy of the checkout, and see what the tests say.

    Args:
        copy: The copy, whole before and afterwards.
        mutant: The fault.
        tests: The test files.
        run_tests: Runs them.
        marks: Selects tests in them.

    Returns:
        The outcome, the tests that noticed, and the time. Tests that exceed the time limit without the fault too make
        it ``"unsure"``, which counts as not noticed.
    """
    if not tests:
        return {"outcome": "none", "by": [], "seconds": 0.0}
    began, file = time.monotonic(), copy / mutant.path
    source = file.read_text(encoding="utf-8")
    wrong: list[str] = []  # that fail without the fault too
    while True:
        file.write_text(mutant.applied(source), encoding="utf-8")
        chosen = [*tests, *(f"--deselect={name}" for name in wrong)]
        try:
            outcome, failed = run_tests(copy, chosen, marks)
        finally:
            file.write_text(source, encoding="utf-8")
        if outcome == "timeout" and run_tests(copy, chosen, marks)[0] == "timeout":
            outcome = "unsure"
        if outcome != "failed" or not failed or run_tests(copy, failed, marks)[0] == "passed":
            return {"outcome": outcome, "by": failed, "seconds": round(time.monotonic() - began, 1)}
        wrong += failed


def hunt(copy: Path, mutant: Mutant, run_tests: Tests) -> dict[str, Any]:
    """Plant a fault, and run more and more tests until one notices: the nearest, theirs of several processes, the next.

    Returns:
        As `plant`, and the files.
    """
    tests = mirrors(copy, mutant.path, mutant.line)
    rounds = ((tests[:MOST_FILES], ALONE), (tests[:MOST_FILES], TOGETHER), (tests[MOST_FILES:], ALONE))
    result: dict[str, Any] = {"tests": tests}
    seconds = 0.0
    for files, marks in rounds:
        found = plant(copy, mutant, files, run_tests, marks)
        seconds += found["seconds"]
        if found["outcome"] in NOTICED or "outcome" not in result:
            result |= found
        if result["outcome"] in NOTICED:
            break
    return {**result, "seconds": round(seconds, 1)}


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


@contextmanager
def copied(root: Path, *, heavy: bool) -> Iterator[tuple[Path, Tests, str]]:
    """Copy a checkout, and start what runs its tests.

    Yields:
        The copy, what runs tests in it, and the commit.
    """
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    with tempfile.TemporaryDirectory() as folder, Tests(PATIENCE, heavy=heavy) as run_tests:
        copy = Path(folder)
        for name in COPIED:
            if (root / name).exists():
                shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("_build", "__pycache__"))
        for file in root.glob("*.*"):
            if file.is_file():
                shutil.copy(file, copy)
        yield copy, run_tests, commit


def shown(mutant: Mutant) -> dict[str, Any]:
    """Parts of a fault that are kept."""
    return {key: getattr(mutant, key) for key in ("name", "path", "line", "operator", "before", "after")}


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
    known = {result["name"] for result in state["results"]}
    with copied(root, heavy=heavy) as (copy, run_tests, commit):
        for mutant in drawn(copy, state["seed"]):
            if len(state["results"]) >= count or time.monotonic() - began > seconds:
                break
            if mutant.name in known:
                continue
            found = hunt(copy, mutant, run_tests)
            state["results"].append({**shown(mutant), **found, "first": found["outcome"], "commit": commit, "note": ""})
            save(results, state)
            print(
                f"{len(state['results'])} {found['outcome']}: {mutant.path}:{mutant.line} {mutant.operator}", flush=True
            )
    return state


def again(root: Path, results: Path, seconds: float, *, heavy: bool = True) -> dict[str, Any]:
    """Plant those faults once more that lived and are not explained; forget those whose place has gone.

    Args:
        root: As for `run`.
        results: As for `run`.
        seconds: As for `run`.
        heavy: As for `Tests`.

    Returns:
        The results.
    """
    state, began = load(results), time.monotonic()
    with copied(root, heavy=heavy) as (copy, run_tests, commit):
        there = {mutant.name: mutant for mutant in drawn(copy, state["seed"])}
        state["results"] = [result for result in state["results"] if result["name"] in there or not alive(result)]
        for result in filter(alive, state["results"]):
            if time.monotonic() - began > seconds:
                break
            mutant = there[result["name"]]
            first = result.get("first", result["outcome"])
            result |= {**shown(mutant), **hunt(copy, mutant, run_tests), "first": first, "commit": commit}
            save(results, state)
            print(f"{result['outcome']}: {mutant.path}:{mutant.line} {mutant.operator}", flush=True)
    return state


def alive(result: dict[str, Any]) -> bool:
    """Tell whether no test noticed a fault, and nothing explains why."""
    return result["outcome"] not in NOTICED and not result["note"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    planting = commands.add_parser("run")
    planting.add_argument("--count", type=int, default=100)
    planting.add_argument("--seconds", type=float, default=3600.0)
    once_more = commands.add_parser("again")
    once_more.add_argument("--seconds", type=float, default=3600.0)
    commands.add_parser("page")
    explaining = commands.add_parser("explain")
    explaining.add_argument("number", type=int)
    explaining.add_argument("why")
    given = parser.parse_args()
    if given.command == "run":
        run(ROOT, RESULTS, given.count, given.seconds)
    if given.command == "again":
        again(ROOT, RESULTS, given.seconds)
    state = load(RESULTS)
    if given.command == "explain":
        state["results"][given.number - 1]["note"] = given.why
        save(RESULTS, state)
    PAGE.write_text(page(state), encoding="utf-8")


if __name__ == "__main__":
    main()
