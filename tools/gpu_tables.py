"""Write docs/benchmarks/gpu.md from the measurements of `tools/gpu_check.py`.

python tools/gpu_tables.py gpu_check.json           # prints the page
python tools/gpu_tables.py gpu_check.json --write   # and writes it, with the JSON beside it
python tools/gpu_tables.py first.json second.json   # several runs on one machine: the last outcome of an item counts
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT), str(ROOT / "benchmarks")]

from _report import markdown_table
from gpu_parts.tables import GOALS

PAGE = ROOT / "docs" / "benchmarks" / "gpu.md"
Items = dict[str, dict[str, Any]]
MEANING = {
    "numerics": "functions in float32, TF32 and bfloat16, against float64 on the CPU",
    "contract": "training with callbacks, against the same on the CPU; two processes share the GPU over gloo",
    "half": "bf16 and fp16 with the fused AdamW",
    "compiled": '`torch.compile`, `mode="reduce-overhead"`, and manually captured graphs',
    "syncs": 'steps under `torch.cuda.set_sync_debug_mode("error")`',
    "tables": "times and memory",
}


def verdict(met: bool) -> str:
    return "yes" if met else "no"


def outcomes(parts: dict[str, Items]) -> str:
    """Number of items of each part that passed."""
    rows = []
    for name, items in parts.items():
        counts = Counter(entry["status"] for label, entry in items.items() if label != "part")
        seconds = items["part"]["seconds"] if "part" in items else 0.0
        cells = [str(counts[status]) for status in ("passed", "failed", "out of time", "not installed")]
        rows.append([MEANING[name], *cells, f"{seconds:.0f}"])
    return markdown_table(["", "passed", "failed", "out of time", "not installed", "s"], rows)


def problems(parts: dict[str, Items]) -> str:
    """Items that failed, with the last line of the error; one line for items that differ only in precision."""
    lines: dict[str, str] = {}
    for part, items in parts.items():
        for name, entry in items.items():
            if entry["status"] in {"failed", "out of time"}:
                last = entry.get("traceback", entry["status"]).strip().splitlines()[-1]
                lines.setdefault(f"{part}, {name.split(': ')[-1]}", last[:200])
    return "\n".join(f"- {name}: `{last}`" for name, last in lines.items()) or "None."


READING = """## Reading these numbers

- No step waits for the host, except the first one and, with masks by magnitude, one per update, in which the channels
  to keep are selected there. `torch.linalg.eigh` reads its status back from the device and takes milliseconds even
  for a small matrix, so singular vectors are followed by matrix products from the second step on.
- The entropy of up to 512 columns or rows takes as long as the host needs to launch its kernels; as CUDA graphs it
  takes as long as the device needs. In a training the host launches ahead of the device, until it cannot keep up.
- In this run a step with the entropy came behind one with `p=1`, in which the host lags: its overhead is an upper
  bound. The script now measures it in a training of its own.
- Stable ranks: with a target rank the small matrices are wider than without, and with `p=1` the polar factor of every
  weight is added; `every_n_steps` up to 4 divides these costs.
- Masks are computed for all layers together. Thresholds multiply every weight by a matrix of its own, forward and
  backward, and a refresh rotates the singular vectors of every layer: with 54 layers that is more than the host can
  launch in the time of a step. Select few large layers, or compress on a machine with a faster host.
- GAP's second-order steps consist mostly of convolutions and their derivatives, which the plain loop computes as
  well."""


ENTROPY = """Forward and backward in float32, interleaved; medians. The published formula decomposes the rows by `svd`,
which waits for the host. Ours is launched operation by operation, and also as CUDA graphs of forward and backward
(`torch.cuda.make_graphed_callables`), which leave out the time of launching."""


def entropy_table(items: Items) -> str:
    rows = []
    for entry in items.values():
        if "published_ms" in entry:
            goal = verdict(entry["ratio"] >= GOALS["vne_ratio"]) if min(entry["n"], entry["d"]) >= 512 else ""
            row = [f"{entry['n']} x {entry['d']}", f"{entry['published_ms']:.2f}", f"{entry['ours_ms']:.2f}"]
            row += [f"{entry['ratio']:.1f}", goal]
            if "graph_ms" in entry:
                row += [f"{entry['graph_ms']:.2f}", f"{entry['published_ms'] / entry['graph_ms']:.1f}"]
            rows.append(row + [f"{entry[key]:.0f}" if key in entry else "" for key in ("published_mib", "ours_mib")])
    header = ["N x d", "published ms", "ours ms", "ratio", "10 or more", "as graphs ms", "ratio"]
    header += ["published MiB", "ours MiB"]
    if not any("graph_ms" in entry for entry in items.values()):
        header = [name for place, name in enumerate(header) if place not in {5, 6}]
    return markdown_table(header, rows)


def shares_table(items: Items, name: str, goals: dict[str, float]) -> str:
    """Whole steps; a goal is looked up by the beginning of a form's name."""
    rows = []
    for form, row in items[name]["rows"].items():
        goal = next((bound for start, bound in goals.items() if form.startswith(start)), None)
        middle = f"{row['low_ms']:.1f} to {row['high_ms']:.1f}"
        cells = [form, f"{row['ms']:.1f}", middle, "" if form.startswith("bare") else f"{row['share']:+.2%}"]
        rows.append([*cells, "" if goal is None else f"{goal:.0%}: {verdict(row['share'] <= goal)}"])
    return markdown_table(["step", "ms", "middle half", "overhead", "goal"], rows)


def adaptation_table(items: Items) -> str:
    rows = []
    for form, row in items["adaptation"]["rows"].items():
        memory = f"{row['peak_mib']:.0f}" if "peak_mib" in row else ""
        goal = "" if form == "plain loop" else verdict(row["ratio"] >= GOALS["gap_ratio"])
        rows.append([form, f"{row['ms']:.1f}", f"{row['ratio']:.2f}", goal, memory])
    return markdown_table(["", "ms", "plain loop / this", "5 or more", "peak MiB"], rows)


def measured(items: Items, name: str) -> bool:
    return "rows" in items.get(name, {})


def page(report: dict[str, Any]) -> str:
    """The whole page."""
    about, parts = report["about"], report["parts"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    cuda = f", CUDA {about['cuda']}, NCCL {about['nccl']}" if "cuda" in about else ""
    seconds = sum(items["part"]["seconds"] for items in parts.values() if "part" in items)
    blocks = [
        "# On a GPU",
        f"One {about['device']}{cuda}; {versions}; {about['date']}. `python tools/gpu_check.py` ran everything in"
        f" {seconds:.0f} s, and `python tools/gpu_tables.py gpu_check.json --write` wrote this page.",
        "## Checks",
        outcomes(parts),
        "Failures:",
        problems(parts),
    ]
    items = parts.get("tables", {})
    if any("published_ms" in entry for entry in items.values()):
        blocks += ["## The von Neumann entropy against the published formula", ENTROPY, entropy_table(items)]
    if measured(items, "penalties"):
        goals = {"entropy": GOALS["vne_share"], "stable rank": GOALS["penalty_share"], "p=": GOALS["penalty_share"]}
        text = (
            "A ResNet-50 on 256 images of 224 x 224, bf16-mixed, channels_last, SGD, in one run: whole steps with each"
            " term and without, interleaved. The stable rank terms act on all weights."
        )
        blocks += ["## What the terms add to a step", text, shares_table(items, "penalties", goals)]
    if measured(items, "choices"):
        text = (
            "The same network: forward, backward, the update of scores and thresholds, and plain SGD, in blocks of four"
            " steps that do not wait for each other, as in a training; milliseconds of a step."
        )
        table = shares_table(items, "choices", {"masks": GOALS["choice_share"]})
        blocks += ["## What masks and thresholds add to a step", text, table]
    if measured(items, "adaptation"):
        text = (
            "A 4-conv network with 64 channels, four 5-way 1-shot tasks of 84 x 84, five second-order steps; float32"
            " without TF32. The plain loop processes task by task and decomposes every kernel's gradient by `svd`."
        )
        blocks += ["## GAP against the plain loop", text, adaptation_table(items)]
    return "\n\n".join([*blocks, READING]) + "\n"


def merged(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge reports; an item that ran out of time does not replace an outcome."""
    about = {**reports[0]["about"], "date": ", ".join(report["about"]["date"] for report in reports)}
    about["seconds"] = sum(report["about"].get("seconds", 0) for report in reports)
    parts: dict[str, Items] = {}
    for report in reports:
        for part, items in report["parts"].items():
            kept = parts.setdefault(part, {})
            for name, entry in items.items():
                if entry["status"] != "out of time" or name not in kept:
                    kept[name] = entry
    return {"about": about, "parts": parts}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args(arguments)
    report = merged([json.loads(path.read_text()) for path in chosen.reports])
    text = page(report)
    print(text)
    if chosen.write:
        PAGE.write_text(text)
        PAGE.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
