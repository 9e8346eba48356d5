"""Test VNERegularization on third-party networks: timm, transformers, and Lightning's demo modules.

Nothing is downloaded. For each network one training step without the callback and one with it are compared; the table
shows the results. `--markdown` writes it into docs/compatibility.md.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import timm
import torch
import transformers
from compatibility_cases import Case, inner_cases, recomputing_cases, timm_cases
from compatibility_checks import Outcome, try_case
from compatibility_others import demo_cases, recomputing_transformers_cases, transformers_cases

FAMILIES_WANTED = 40
PAGE = Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"
BEGIN, END = "<!-- written by tools/compatibility.py: begin -->", "<!-- end -->"


def all_cases() -> list[Case]:
    return [
        *timm_cases(),
        *inner_cases(),
        *transformers_cases(),
        *demo_cases(),
        *recomputing_cases(),
        *recomputing_transformers_cases(),
    ]


def cells(outcome: Outcome) -> dict[str, str]:
    """An outcome as a row of the table."""
    case = outcome.case
    pool = case.pool if isinstance(case.pool, str) else case.pool.__name__
    return {
        "family": case.family,
        "model": case.model,
        "layers": ", ".join(case.layers),
        "pool": pool,
        "recomputed": ("reentrant" if case.reentrant else "not reentrant") if case.checkpointed else "",
        "parameters": f"{outcome.parameters:,}" if outcome.parameters else "",
        "rows x d": ", ".join(f"{rows} x {dim}" for rows, dim in outcome.shapes.values()),
        "entropy": ", ".join(f"{entropy:.2f}" for entropy in outcome.entropies.values()),
        "ms": f"{outcome.ms:.0f}" if outcome.ms else "",
        "result": outcome.problem or outcome.note or "passed",
    }


def columns(outcomes: Sequence[Outcome]) -> list[str]:
    """The non-empty columns of a group."""
    rows = [cells(outcome) for outcome in outcomes]
    return [name for name in rows[0] if any(row[name] for row in rows)]


def markdown(outcomes: Sequence[Outcome]) -> str:
    """Tables by group, without the times, which depend on the machine."""
    lines = [f"timm {timm.__version__}, transformers {transformers.__version__}, Lightning {pl.__version__}."]
    for group in dict.fromkeys(outcome.case.group for outcome in outcomes):
        members = [outcome for outcome in outcomes if outcome.case.group == group]
        names = [name for name in columns(members) if name != "ms"]
        lines += ["", f"### {group[0].upper()}{group[1:]}", "", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
        for outcome in members:
            row = cells(outcome)
            row.update({name: f"`{row[name]}`" for name in ("model", "layers", "pool")})
            lines.append(f"| {' | '.join(row[name] for name in names)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", action="store_true", help=f"write the table into {PAGE.name} as well")
    write = parser.parse_args().markdown
    torch.set_num_threads(1)
    quieten()
    outcomes = []
    for case in all_cases():
        outcomes.append(try_case(case))
        row = cells(outcomes[-1])
        widths = zip(row.values(), (24, 32, 44, 8, 13, 12, 12, 10, 6, 0), strict=True)
        print(" ".join(f"{text:<{width}}" for text, width in widths).rstrip(), flush=True)
    passed = {outcome.case.family for outcome in outcomes if outcome.case.group == "timm" and not outcome.problem}
    failed = [outcome for outcome in outcomes if outcome.problem]
    untried = set(timm.list_modules()) - {outcome.case.family for outcome in outcomes}
    print(f"{len(passed)} families of timm passed; {len(failed)} of {len(outcomes)} cases failed")
    if untried:
        print(f"families of timm that were not tried: {', '.join(sorted(untried))}")
    if write:
        head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n{markdown(outcomes)}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return int(bool(failed) or len(passed) < FAMILIES_WANTED)


def quieten() -> None:
    """Hide warnings of Lightning and the networks about intended settings."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()


if __name__ == "__main__":
    sys.exit(main())
