"""Searches with early termination replayed on stored learning curves: TercetPruner against the pruners of Optuna.

The table is that of ``learning_curves.py``. A search goes through its configurations in a random order, which is the
same for all methods; every epoch is reported to an Optuna trial whose study's pruner decides, and the search is over
when 3,200 epochs are spent. Searches go into ``early_termination.json`` beside this file and are not repeated.

    python benchmarks/early_termination.py              # 40 orders, several minutes on one core
    python benchmarks/early_termination.py --page       # only the page and its figure, of what is stored
"""

import argparse
import json
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from _report import describe_machine, half_width, markdown_table, mean_and_interval
from learning_curves import EPOCHS, load
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.trial import TrialState

from lightning_plugins.plots.style import COLOURS, INK, empty_figure, style_axes
from lightning_plugins.search import TercetPruner

RESULTS = Path(__file__).with_suffix(".json")
DOCS = Path(__file__).parents[1] / "docs"
AT = (400, 800, 1600, 3200)
OURS, NONE = "TercetPruner", "no pruning"
METHODS: dict[str, Callable[[int], BasePruner]] = {
    NONE: lambda epochs: NopPruner(),
    OURS: TercetPruner,
    "TercetPruner, 0.9 twice": lambda epochs: TercetPruner(epochs, quantiles=(0.9, 0.9)),
    "MedianPruner": lambda epochs: MedianPruner(),
    "SuccessiveHalvingPruner": lambda epochs: SuccessiveHalvingPruner(),
    "HyperbandPruner": lambda epochs: HyperbandPruner(max_resource=epochs),
}
Curves = np.ndarray[Any, np.dtype[np.int64]]


def follow(study: optuna.Study, curve: Sequence[int]) -> tuple[int, bool]:
    """One training as a trial: the number of its epochs, and whether it came to its end."""
    trial = study.ask()
    for epoch, value in enumerate(curve, 1):
        trial.report(float(value), epoch)
        if epoch < len(curve) and trial.should_prune():
            study.tell(trial, state=TrialState.PRUNED)
            return epoch, False
    study.tell(trial, float(curve[-1]))
    return len(curve), True


def search(curves: Curves, method: str, seed: int, limit: int = AT[-1]) -> dict[str, Any]:
    """A search in the order of a seed.

    Returns:
        By trial its ``epochs``; the ``complete`` incumbents, those best so far among completed trainings, as pairs of
        the epochs spent when they came and their row; and the same of ``any`` training by its last value.
    """
    study = optuna.create_study(
        study_name=f"order {seed}",  # by it the trials of HyperbandPruner get their brackets
        sampler=optuna.samplers.RandomSampler(seed=seed),
        pruner=METHODS[method](curves.shape[1]),
    )
    found: dict[str, Any] = {"epochs": [], "complete": [], "any": []}
    best = {"complete": np.inf, "any": np.inf}
    spent = 0
    for row in order(len(curves), seed):
        epochs, complete = follow(study, curves[row].tolist())
        spent += epochs
        found["epochs"].append(epochs)
        value = float(curves[row, epochs - 1])
        for kind in ("complete", "any") if complete else ("any",):
            if value < best[kind]:
                best[kind] = value
                found[kind].append([spent, row])
        if spent >= limit:
            break
    return found


def order(rows: int, seed: int) -> list[int]:
    """The order of the rows that a seed stands for."""
    return [int(row) for row in np.random.default_rng([1, seed]).permutation(rows)]


def regret(curves: Curves, incumbents: Sequence[Sequence[int]], spent: int) -> float:
    """The regret in errors of the incumbent when so many epochs are spent; that of the worst row without one."""
    last = curves[:, -1]
    rows = [row for came, row in incumbents if came <= spent]
    return float((last[rows[-1]] if rows else last.max()) - last.min())


def outcome(curves: Curves, found: dict[str, Any], seed: int) -> dict[str, float]:
    """Counts of a whole search, and the price of ending the best of the trainings that it has tried."""
    epochs, last = np.array(found["epochs"]), curves[:, -1]
    rows = np.array(order(len(curves), seed)[: len(epochs)])
    complete = epochs == curves.shape[1]
    lost = float(last[rows[complete]].min() - last[rows].min())
    best = last[rows] == last.min()
    return {
        "trainings": len(epochs),
        "ended": int((~complete).sum()),
        "epochs": float(epochs.mean()),
        "lost": lost,
        "tried": int(best.any()),
        "missed": int(best.any() and not complete[best].any()),
    }


def percent(errors: Sequence[float], images: int) -> list[float]:
    return [100 * value / images for value in errors]


def regrets(stored: dict[str, Any], table: dict[str, Any], method: str, spent: int, kind: str) -> list[float]:
    """Regrets of all searches of a method in points of the validation error, in the order of the seeds."""
    searches = stored["searches"][method].values()
    return percent([regret(table["curves"], found[kind], spent) for found in searches], table["images"])


def regret_table(stored: dict[str, Any], table: dict[str, Any], kind: str) -> str:
    rows = [
        [method, *(mean_and_interval(regrets(stored, table, method, spent, kind), 2) for spent in AT)]
        for method in stored["searches"]
    ]
    return markdown_table(["pruner", *(f"{spent} epochs" for spent in AT)], rows)


def differences(stored: dict[str, Any], table: dict[str, Any]) -> str:
    """Regret of `TercetPruner` less that of the others in the same order; bold where zero is outside."""
    rows = []
    for rival in [method for method in stored["searches"] if method != OURS]:
        cells = []
        for spent in AT:
            pairs = zip(*(regrets(stored, table, name, spent, "complete") for name in (OURS, rival)), strict=True)
            values = [ours - theirs for ours, theirs in pairs]
            shown = f"{statistics.fmean(values):+.2f} ± {half_width(values):.2f}"
            cells.append(f"**{shown}**" if abs(statistics.fmean(values)) > half_width(values) else shown)
        rows.append([rival, *cells])
    return markdown_table(["less the regret of", *(f"{spent} epochs" for spent in AT)], rows)


def outcome_table(stored: dict[str, Any], table: dict[str, Any]) -> str:
    rows = []
    for method, searches in stored["searches"].items():
        all_of = [outcome(table["curves"], found, int(seed)) for seed, found in searches.items()]
        total = {name: sum(each[name] for each in all_of) for name in all_of[0]}
        rows.append(
            [
                method,
                f"{total['trainings'] / len(all_of):.0f}",
                f"{total['ended'] / len(all_of):.0f}",
                f"{total['epochs'] / len(all_of):.1f}",
                f"{sum(each['lost'] > 0 for each in all_of)} of {len(all_of)}",
                mean_and_interval(percent([each["lost"] for each in all_of], table["images"]), 2),
                f"{total['missed']} of {total['tried']}",
            ]
        )
    ended = ["best of those tried ended", "points lost by it", "best of the table ended"]
    return markdown_table(["pruner", "trainings", "ended", "epochs each", *ended], rows)


def draw(stored: dict[str, Any], table: dict[str, Any], path: Path) -> None:
    """Mean regret against the epochs spent."""
    figure = empty_figure(width=7.2, height=4.4, title="Regret against epochs spent")
    axes = figure.subplots()
    spent = list(range(EPOCHS, AT[-1] + 1, EPOCHS))
    for method, colour in zip(stored["searches"], COLOURS, strict=False):
        means = [statistics.fmean(regrets(stored, table, method, each, "complete")) for each in spent]
        axes.plot(spent, means, color=colour, linewidth=2.0, label=method)
    style_axes(axes, "epochs", "mean regret, points of validation error")
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    figure.savefig(path)


def wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False)


def page(stored: dict[str, Any], table: dict[str, Any]) -> str:
    last = np.sort(table["curves"][:, -1])
    shown = percent([last[0], last[len(last) // 10], last[len(last) // 2]], table["images"])
    numbers = {
        "rows": len(last),
        "best": shown[0],
        "tenth": shown[1],
        "median": shown[2],
        "at_best": sum(last == last[0]),
    }
    orders = len(stored["searches"][OURS])
    parts = [
        "# Early termination of trainings in a search",
        wrapped(INTRODUCTION.format(**numbers, orders=orders)),
        f"Curves: {table['machine']}.\n\nSearches: {stored['machine']}.",
        "## Regret",
        wrapped(REGRET),
        regret_table(stored, table, "complete"),
        "![Mean regret against epochs spent](../images/early_termination.png)",
        wrapped(DIFFERENCES),
        differences(stored, table),
        wrapped(FINDING),
        "## Trainings that were ended",
        wrapped(ENDED),
        outcome_table(stored, table),
        "## Ended trainings as results",
        wrapped(ANY),
        regret_table(stored, table, "any"),
    ]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """`benchmarks/early_termination.py` replays searches on the learning curves of {rows} random
configurations (learning rate, momentum, weight decay, width, batch size, dropout) of a network with two hidden layers,
each trained for 40 epochs on scikit-learn's digits by `benchmarks/learning_curves.py`. After 40 epochs the best has a
validation error of {best:.2f} % ({at_best} of {rows}), the best tenth at most {tenth:.2f} %, half of them at most
{median:.2f} %. Learning rates are constant and the curves are those of one task and one seed each: intervals (95 %,
Student's t) are over {orders} random orders of the table, the same for all methods, and say nothing about other tasks.
Pruners have their defaults; `0.9 twice` is `quantiles=(0.9, 0.9)`, as the authors' code has it in some benchmarks."""
REGRET = """Points of validation error, of the best of the completed trainings at its last epoch, less the best of the
table."""
DIFFERENCES = """Regret of `TercetPruner` less that of the others in the same orders; negative favours `TercetPruner`,
and intervals without zero are bold."""
FINDING = """On this table `TercetPruner` is not shown to be better than no pruning, and its regret is larger than that
of each of Optuna's pruners. Many of these configurations hardly learn, which shows in the first epochs; its looks at
half and at nine tenths of a training come too late to save much. It ends the best of those tried less often."""
ENDED = """Means of whole searches of 3,200 epochs, or of the whole table where it is at its end before. The best of
those tried is known from the table; it counts as ended if no training with its last error was completed, and the points
lost are the difference of the best completed one."""
ANY = """Regret where the incumbent is chosen among all trainings by their last value, ended ones included, as in the
paper of `TercetPruner`; it counts with its error after 40 epochs, though the epochs that it lacks are not counted as
spent."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, default=40)
    parser.add_argument("--page", action="store_true", help="only write the page of what is stored")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    table = load()
    table["curves"] = np.array([kept["wrong"] for _, kept in sorted(table["rows"].items())])
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"machine": "", "searches": {}}
    for seed in [] if arguments.page else range(arguments.orders):
        for method in METHODS:
            kept = stored["searches"].setdefault(method, {})
            if str(seed) not in kept:
                kept[str(seed)] = search(table["curves"], method, seed)
                stored["machine"] = f"{describe_machine('cpu')}; Optuna {optuna.__version__}"
        RESULTS.write_text(json.dumps(stored, separators=(",", ":")) + "\n")
        print(f"order {seed}", flush=True)
    text = page(stored, table)
    print(text)
    if arguments.page:
        (DOCS / "benchmarks" / "early_termination.md").write_text(text, encoding="utf-8")
        draw(stored, table, DOCS / "images" / "early_termination.png")


if __name__ == "__main__":
    main()
