"""Time of a suggestion of B2EASampler as its history grows, and the memory of a search of 1,000 trials.

The space has nine parameters: four floats (two logarithmic), two ints (one logarithmic), one stepped float and two
categories. For the times the history is made of random trials; then twelve suggestions are timed, two for each of the
six arms that rank the candidates. For the memory one process runs a search of 1,000 trials, of which every second is
the sampler's, among 1,000 candidates to save time. Results go into ``search_overhead.json`` beside this file.

    python benchmarks/search_overhead.py             # several minutes on one core, most of it for the memory
    python benchmarks/search_overhead.py --page      # only the page of what is stored
"""

import argparse
import gc
import json
import math
import statistics
import textwrap
import time
from pathlib import Path
from typing import Any

import optuna
import torch
from _report import describe_machine, markdown_table

from lightning_plugins.search import B2EASampler

RESULTS = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "search_overhead.md"
SIZES, TIMED = (50, 100, 200, 300, 500), 12
MEMORY_AT = (100, 200, 500, 750, 1000)
STATM = Path("/proc/self/statm")


def objective(trial: optuna.Trial) -> float:
    """A smooth function of nine mixed parameters."""
    lr = trial.suggest_float("lr", 1e-5, 1e-1, log=True)
    decay = trial.suggest_float("decay", 1e-6, 1e-2, log=True)
    momentum = trial.suggest_float("momentum", 0, 1)
    dropout = trial.suggest_float("dropout", 0, 0.6)
    width = trial.suggest_int("width", 16, 512, log=True)
    layers = trial.suggest_int("layers", 1, 6)
    smoothing = trial.suggest_float("smoothing", 0, 0.3, step=0.05)
    kind = trial.suggest_categorical("optimizer", ["sgd", "adam", "lion"])
    activation = trial.suggest_categorical("activation", ["relu", "gelu", "tanh", "silu"])
    value = (math.log10(lr) + 3) ** 2 + (math.log10(decay) + 4) ** 2 / 4 + (momentum - 0.9) ** 2 + dropout**2
    value += (math.log2(width) - 7) ** 2 / 8 + (layers - 3) ** 2 / 9 + smoothing
    return value + 0.3 * (kind == "sgd") + 0.2 * (activation == "tanh") + 0.1 * math.sin(20 * momentum)


def times(size: int, timed: int = TIMED) -> list[float]:
    """Processor seconds of suggestions behind so many random trials; each adds its own trial."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=size))
    study.optimize(objective, n_trials=size)
    study.sampler = B2EASampler(seed=0)
    found = []
    for _ in range(timed):
        start = time.process_time()
        trial = study.ask()
        value = objective(trial)
        found.append(time.process_time() - start)
        study.tell(trial, value)
    return found


def resident() -> float:
    """The resident size of this process in MiB."""
    return int(STATM.read_text().split()[1]) * 4096 / 2**20


def memory(at: tuple[int, ...] = MEMORY_AT) -> dict[str, float]:
    """Resident size in MiB behind so many trials of a search."""
    samplers = [optuna.samplers.RandomSampler(seed=0), B2EASampler(seed=0, max_candidates=1000)]
    study = optuna.create_study()
    found = {}
    for number in range(1, at[-1] + 1):
        study.sampler = samplers[number % 2]
        study.optimize(objective, n_trials=1)
        if number in at:
            gc.collect()
            found[str(number)] = resident()
            print(number, found[str(number)], flush=True)
    return found


def page(stored: dict[str, Any]) -> str:
    seconds = [
        [size, f"{statistics.fmean(found):.2f}", f"{statistics.median(found):.2f}", f"{max(found):.2f}"]
        for size, found in stored["seconds"].items()
    ]
    sizes = [[number, f"{size:.0f}"] for number, size in stored["memory"].items()]
    return "\n\n".join(
        [
            "# Time and memory of a search",
            textwrap.fill(" ".join(INTRODUCTION.split()), 120, break_on_hyphens=False),
            "## Seconds per suggestion",
            f"{stored['machines']['seconds']}.",
            markdown_table(["trials before", "mean", "median", "longest"], seconds),
            "## Resident size",
            f"{stored['machines']['memory']}.",
            markdown_table(["trials", "MiB"], sizes) + "\n",
        ]
    )


INTRODUCTION = """`benchmarks/search_overhead.py`: `B2EASampler` on a space of nine parameters (floats, logarithmic and
stepped ones, ints, two categories). Seconds are those of the processor on one thread, for twelve suggestions behind
random trials, behind those with which a process imports its libraries; the Gaussian process takes 200 of the trials at
most. Resident sizes are those of one process with a study of 1,000 trials in memory, of which every second is the
sampler's, among 1,000 candidates to save time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="only write the page of what is stored")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"seconds": {}, "memory": {}}
    if arguments.page:
        PAGE.write_text(page(stored), encoding="utf-8")
        return
    times(10)  # the first suggestions of a process import scikit-learn and SciPy
    for size in SIZES:
        if str(size) not in stored["seconds"]:
            stored["seconds"][str(size)] = [round(each, 4) for each in times(size)]
            print(size, statistics.fmean(stored["seconds"][str(size)]), flush=True)
            save(stored, "seconds")
    if not stored["memory"]:
        stored["memory"] = memory()
        save(stored, "memory")


def save(stored: dict[str, Any], part: str) -> None:
    stored.setdefault("machines", {})[part] = f"{describe_machine('cpu')}; Optuna {optuna.__version__}"
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
