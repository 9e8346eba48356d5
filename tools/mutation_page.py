"""The page of the faults that were planted, and of those that no test noticed."""

from collections import Counter
from typing import Any

from mutation_mirrors import PACKAGE, folder_of

NOTICED = ("failed", "timeout", "broken")


def table(results: list[dict[str, Any]], key: Any, title: str) -> list[str]:
    """Lines of a table that counts outcomes by some key."""
    planted, noticed = Counter(map(key, results)), Counter(key(r) for r in results if r["outcome"] in NOTICED)
    rows = [f"| {name} | {planted[name]} | {noticed[name]} |" for name in sorted(planted)]
    return [f"| {title} | planted | noticed |", "|---|---|---|", *rows, ""]


def figures(state: dict[str, Any]) -> list[str]:
    """Lines that say how many faults were noticed at first, how many are today, and how many are explained."""
    results = state["results"]
    noticed = sum(result["outcome"] in NOTICED for result in results)
    at_first = sum(result.get("first", result["outcome"]) in NOTICED for result in results)
    explained = sum(result["outcome"] not in NOTICED and bool(result["note"]) for result in results)
    details = ", ".join(f"{number} {name}" for name, number in sorted(Counter(r["outcome"] for r in results).items()))
    return [
        f"Faults drawn with seed {state['seed']}:",
        "",
        "| | faults |",
        "|---|---|",
        *(
            f"| {name} | {number} of {len(results)}{percent(number, results)} |"
            for name, number in (
                ("noticed when they were first planted", at_first),
                ("noticed today, with the tests that were written for the others", noticed),
                ("noticed or explained", noticed + explained),
            )
        ),
        "",
        f"In detail: {details}. A test counts only if it passes without the fault.",
        "*Timeout*: tests hang with the fault; *broken*: they cannot be collected; both are noticed. *None*: no test",
        "file was found. *Unsure*: the tests exceed the time limit without the fault too, which is not noticed.",
        "",
    ]


def percent(part: int, results: list[Any]) -> str:
    """A share in brackets; empty where there is nothing."""
    return f" ({part / len(results):.0%})" if results else ""


def page(state: dict[str, Any]) -> str:
    """The page of all results, with every fault that no test noticed."""
    results = state["results"]
    lived = [(i, result) for i, result in enumerate(results, 1) if result["outcome"] not in NOTICED]
    explained = sum(bool(result["note"]) for _, result in lived)
    lines = [
        "# Planted faults",
        "",
        "Written by `tools/mutants.py page`. Small faults are planted in the package, in turns from every operator and",
        "folder, and the tests nearest to the place are run, without those marked `slow`. A fault that was not noticed",
        "is planted again when there is a new test (`tools/mutants.py again`).",
        "",
        *figures(state),
        *table(results, lambda result: result["operator"], "operator"),
        *table(results, lambda result: folder_of(result["path"]), "folder"),
        f"## Not noticed: {len(lived)}, of which {explained} are explained",
        "",
        *(["| | place | before | after | why |", "|---|---|---|---|---|"] if lived else []),
    ]
    for number, result in lived:
        before, after = (" ".join(result[key].split()).replace("|", "\\|")[:80] for key in ("before", "after"))
        place = f"`{result['path'].removeprefix(PACKAGE + '/')}`, line {result['line']}"
        lines.append(f"| {number} | {place} | `{before}` | `{after}` | {result['note'] or 'open'} |")
    return "\n".join(lines) + "\n"
