"""Where a term of representations helps, and where not: small batches, another domain, few shots, a GAN.

Every training's result is kept in a file and read from there, so that a run that was stopped goes on. Methods with
several settings are trained with each on a seed of their own, and the best by validation then trains once a seed.

    python benchmarks/representations.py                          # what is missing of all parts, and the page
    python benchmarks/representations.py fonts gan --minutes 10   # as much of two parts as begins within ten minutes
    python benchmarks/representations.py --minutes 0              # the page alone
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from _report import describe_machine, half_width, markdown_table, mean_and_interval
from representation_parts import few_shot, fonts, gan, self_supervised
from representation_parts.part import Part, Run

DOCS = Path(__file__).parents[1] / "docs"
STORE = DOCS / "benchmarks" / "representations.json"
PARTS: dict[str, Part] = {
    "self-supervised": self_supervised.PART,
    "fonts": fonts.PART,
    "few-shot": few_shot.PART,
    "gan": gan.PART,
}
SEARCH_SEED = 100
Store = dict[str, dict[str, float]]


def key(name: str, run: Run) -> str:
    return " | ".join([name, run.group, run.method, f"{run.knob:g}", str(run.seed)])


def searched(part: Part, group: str, method: str) -> list[Run]:
    """The trainings that choose a setting; none if there is no choice."""
    knobs = part.methods[method]
    return [Run(group, method, knob, SEARCH_SEED, search=True) for knob in knobs] if len(knobs) > 1 else []


def best(name: str, part: Part, group: str, method: str, store: Store) -> float | None:
    """The setting with the best score of the search; None while it is not finished."""
    runs = searched(part, group, method)
    if not runs:
        return part.methods[method][0]
    if any(key(name, run) not in store for run in runs):
        return None
    sign = 1 if part.higher else -1
    return max(runs, key=lambda run: sign * store[key(name, run)][part.score]).knob


def missing(name: str, part: Part, store: Store) -> list[Run]:
    """Group by group the searches, then seed by seed, so that what has run after a while is even."""
    for group in part.groups:
        runs = [run for method in part.methods for run in searched(part, group, method)]
        if all(key(name, run) in store for run in runs):
            chosen = {method: best(name, part, group, method, store) for method in part.methods}
            seeds = range(part.seeds)
            runs = [Run(group, method, knob, seed, search=False) for seed in seeds for method, knob in chosen.items()]
        if left := [run for run in runs if key(name, run) not in store]:
            return left
    return []


def results(name: str, part: Part, group: str, method: str, store: Store) -> dict[int, dict[str, float]]:
    """Results of the chosen setting, by seed."""
    knob = best(name, part, group, method, store)
    if knob is None:
        return {}
    runs = [Run(group, method, knob, seed, search=False) for seed in range(part.seeds)]
    return {run.seed: store[key(name, run)] for run in runs if key(name, run) in store}


def table(name: str, part: Part, group: str, store: Store) -> str:
    reference = results(name, part, group, part.reference, store)
    rows = []
    for method in part.methods:
        found = results(name, part, group, method, store)
        if not found:
            continue
        both = [seed for seed in found if seed in reference]
        lead = [found[seed][part.score] - reference[seed][part.score] for seed in both]
        several = len(part.methods[method]) > 1
        cells = [mean_and_interval([one[column] for one in found.values()], 1) for column in part.columns]
        more = mean_and_interval(lead, 1) if method != part.reference and len(lead) > 1 else ""
        knob = f"{best(name, part, group, method, store):g}" if several else ""
        rows.append([method, *([knob] if any_choice(part) else []), *cells, more, str(len(found))])
    chosen = ["chosen"] if any_choice(part) else []
    return markdown_table(["", *chosen, *part.columns.values(), f"minus {part.reference}", "seeds"], rows)


def any_choice(part: Part) -> bool:
    return any(len(knobs) > 1 for knobs in part.methods.values())


def figure(name: str, part: Part, store: Store) -> str:
    """Means with their intervals, a panel for each group; returns the picture's path from the page."""
    groups = [group for group in part.groups if results(name, part, group, part.reference, store)]
    columns = min(len(groups), 4)
    rows = -(-len(groups) // columns)
    size = (2.6 * columns + 2.2, (0.26 * len(part.methods) + 0.8) * rows)
    made, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    for axis, group in zip(axes.flat, groups, strict=False):
        for place, method in enumerate(reversed(part.methods)):
            values = [one[part.score] for one in results(name, part, group, method, store).values()]
            if values:
                width = half_width(values) if len(values) > 1 else 0
                axis.errorbar(statistics.fmean(values), place, xerr=width, fmt="o", color="C0", markersize=4)
        axis.set_yticks(range(len(part.methods)), list(reversed(part.methods)))
        axis.set_title(group, fontsize=9)
        axis.set_xlabel(part.columns[part.score], fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.3)
    path = DOCS / "images" / f"representations_{name.replace('-', '_')}.png"
    made.savefig(path, dpi=110)
    plt.close(made)
    return f"../images/{path.name}"


def page(store: Store, machine: str) -> str:
    parts = [
        "# Where a term of representations helps",
        "Written by `benchmarks/representations.py` from `representations.json`. Intervals are 95 % over training"
        " seeds, and differences are paired by seed.",
        machine,
    ]
    for name, part in PARTS.items():
        if any(one.startswith(f"{name} |") for one in store):
            parts += [f"## {part.title}", part.text, f"![{part.title}]({figure(name, part, store)})"]
            for group in part.groups:
                if results(name, part, group, part.reference, store):
                    parts += [f"**{group}**", table(name, part, group, store)]
            conclusion = Path(__file__).with_name("representation_parts") / f"{name}.md"
            if conclusion.exists():
                parts.append(conclusion.read_text().strip())
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--store", type=Path, default=STORE)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}; there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    kept: dict[str, Any] = json.loads(options.store.read_text()) if options.store.exists() else {"results": {}}
    store: Store = kept["results"]
    end = time.monotonic() + 60 * options.minutes
    for name in options.parts or PARTS:
        while time.monotonic() < end and (runs := missing(name, PARTS[name], store)):
            begun = time.process_time()
            found = PARTS[name].run(runs[0])
            store[key(name, runs[0])] = {**found, "seconds": round(time.process_time() - begun, 1)}
            kept["machine"] = describe_machine("cpu")
            options.store.write_text(json.dumps(kept, indent=1) + "\n")
            print(key(name, runs[0]), store[key(name, runs[0])], flush=True)
    options.store.with_suffix(".md").write_text(page(store, kept["machine"]))


if __name__ == "__main__":
    main()
