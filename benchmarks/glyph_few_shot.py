"""Few-shot classification of glyphs: six methods at equal budgets, several training seeds, the same test tasks.

All methods train a network of four strided convolutions on the same tasks, with the same inner steps and iterations. A
search at one shot, with a separate training seed, tries the same inner rates and second rates for every method. The
setting with a method's highest accuracy on validation tasks, of other characters, is then trained once per seed, which
determines the initial network and the training tasks, and tested on tasks of yet other characters. Intervals are over
training seeds; differences to MAML are paired by seed. Runs are stored in a file and not repeated, so that the study
can be interrupted.

    python benchmarks/glyph_few_shot.py                    # what is missing of the study, and its tables
    python benchmarks/glyph_few_shot.py --minutes 10       # as much as begins within ten minutes
    python benchmarks/glyph_few_shot.py --minutes 0        # the tables alone
    python benchmarks/glyph_few_shot.py --iterations 200 --search 100 --shots 1    # a shorter study
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _report import describe_machine, markdown_table, mean_and_interval
from torch import nn

from lightning_plugins.meta import (
    GAP,
    ApproximateGAP,
    EpisodeLoader,
    GlyphFewShot,
    Identity,
    InnerLoop,
    MetaSGD,
    Preconditioner,
    use_batch_statistics,
)

RESULTS = Path(__file__).parents[1] / "docs" / "benchmarks" / "glyphs.json"
METHODS: dict[str, Callable[[], Preconditioner]] = {
    "MAML": Identity,
    "MAML, learned rates": Identity,  # one per adapted tensor
    "Meta-SGD": MetaSGD,
    "GAP": GAP,
    "GAP, last layer too": lambda: GAP(linear=True),
    "approximate GAP": ApproximateGAP,
}
FIRST = ("MAML", "MAML, learned rates", "GAP, last layer too")
INNER_RATES = (0.03, 0.1)
SECOND_RATES = (0.01, 0.05)  # Adam's, of what the preconditioner learns and of learned rates
SEEDS, SEARCH_SEED = (0, 1, 2, 3, 4), 100
WAYS, TRAINING_QUERIES, QUERIES = 5, 5, 15
STEPS, EVALUATION_STEPS = 3, 5
TASKS_PER_BATCH, VALIDATION_TASKS, TEST_TASKS = 4, 200, 600
CHANNELS, RATE = 32, 2e-3


class Setting(NamedTuple):
    method: str
    inner_rate: float
    second_rate: float
    shots: int
    iterations: int
    seed: int


Results = dict[Setting, dict[str, Any]]


class Study(NamedTuple):
    """Settings of a run."""

    search: int = 200  # iterations
    iterations: int = 400
    shots: tuple[int, ...] = (1, 5)

    def searched(self) -> list[Setting]:
        """The same rates for every method; plain MAML has no second one."""
        return [
            Setting(method, inner, second, 1, self.search, SEARCH_SEED)
            for method in METHODS
            for inner in INNER_RATES
            for second in (SECOND_RATES if method != "MAML" else (0.0,))
        ]

    def best(self, method: str, results: Results) -> Setting:
        """The method's setting with the highest accuracy in the search."""
        return max((one for one in self.searched() if one.method == method), key=lambda s: results[s]["validation"])

    def in_full(self, results: Results) -> list[Setting]:
        """The best setting of every method, seed by seed: first of the methods whose order is in question."""
        best = [self.best(method, results) for method in METHODS]
        return [
            setting._replace(shots=shots, iterations=self.iterations, seed=seed)
            for shots in self.shots
            for first in (True, False)
            for seed in SEEDS
            for setting in best
            if (setting.method in FIRST) is first
        ]

    def plan(self, results: Results) -> list[Setting]:
        """As far as it is known."""
        settings = self.searched()
        return settings + (self.in_full(results) if all(setting in results for setting in settings) else [])


def conv4() -> nn.Sequential:
    """Four strided convolutions with batch statistics: 28, 14, 7, 4 and 2 pixels wide."""
    blocks: list[nn.Module] = []
    for inputs in (1, CHANNELS, CHANNELS, CHANNELS):
        blocks += [nn.Conv2d(inputs, CHANNELS, 3, stride=2, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU()]
    return use_batch_statistics(nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4 * CHANNELS, WAYS)))


def train(setting: Setting) -> InnerLoop:
    torch.manual_seed(setting.seed)
    network = conv4()
    loop = InnerLoop(
        network,
        F.cross_entropy,
        METHODS[setting.method](),
        steps=STEPS,
        learning_rate=setting.inner_rate,
        rates="learned" if setting.method == "MAML, learned rates" else "fixed",
    )
    learned = [*loop.preconditioner.parameters(), *loop.rates.parameters()]
    groups = [{"params": network.parameters()}, {"params": learned, "lr": setting.second_rate}]
    optimizer = torch.optim.Adam(groups, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.iterations)
    tasks = GlyphFewShot("train", WAYS, setting.shots, TRAINING_QUERIES)
    episodes = setting.iterations * TASKS_PER_BATCH
    for support, query in EpisodeLoader(tasks, episodes, TASKS_PER_BATCH, seed=setting.seed):
        loss = loop(support, query).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loop


def accuracies(loop: InnerLoop, shots: int, split: Any, count: int) -> list[float]:
    """The accuracy on every task, in percent."""
    found: list[float] = []
    for support, query in EpisodeLoader(GlyphFewShot(split, WAYS, shots, QUERIES), count, 10, fixed=True):
        with torch.no_grad():
            outputs = loop(support, query, steps=EVALUATION_STEPS).outputs
        found += (100 * (outputs.argmax(2) == query[1]).double().mean(1)).tolist()
    return [round(accuracy, 2) for accuracy in found]


def run(setting: Setting) -> dict[str, Any]:
    start = time.process_time()
    loop = train(setting)
    result = {"seconds": round(time.process_time() - start, 1), "machine": describe_machine("cpu")}
    if setting.seed == SEARCH_SEED:
        result["validation"] = statistics.fmean(accuracies(loop, setting.shots, "val", VALIDATION_TASKS))
        return result
    result["test"] = accuracies(loop, setting.shots, "test", TEST_TASKS)
    if isinstance(loop.preconditioner, GAP | ApproximateGAP):
        gains = loop.preconditioner.gains()
        result["gains"] = {name: [round(value, 3) for value in gain.tolist()] for name, gain in gains.items()}
    if loop.rates:
        result["rates"] = {name: round(rate.item(), 4) for name, rate in loop.rates.items()}
    return result


def load() -> Results:
    entries = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return {Setting(*entry["setting"]): entry["result"] for entry in entries}


def keep(results: Results) -> None:
    """Beside the file first: an interruption leaves the file of before."""
    entries = [json.dumps({"setting": setting, "result": result}) for setting, result in results.items()]
    beside = RESULTS.with_suffix(".part")
    beside.write_text("[\n" + ",\n".join(entries) + "\n]\n")
    beside.replace(RESULTS)


def work(study: Study, minutes: float) -> Results:
    """Run what is missing, as long as there is time to begin."""
    end = time.monotonic() + 60 * minutes
    results = load()
    while missing := [setting for setting in study.plan(results) if setting not in results]:
        if time.monotonic() > end:
            print(f"{len(missing)} runs or more are missing")
            break
        results[missing[0]] = run(missing[0])
        found = results[missing[0]]
        print(*missing[0], found.get("validation") or statistics.fmean(found["test"]), found["seconds"], flush=True)
        keep(results)
    return results


def tables(study: Study, results: Results) -> str:
    search = [setting for setting in study.searched() if setting in results]
    rows = [
        [one.method, f"{one.inner_rate}", f"{one.second_rate or ''}", f"{results[one]['validation']:.1f}"]
        for one in search
    ]
    text = [
        f"Validation accuracy (%) over {VALIDATION_TASKS} tasks after {study.search} iterations, one shot, one seed:\n",
        markdown_table(["method", "inner rate", "second rate", "validation"], rows),
    ]
    if len(search) == len(study.searched()):
        header = ["method", "shots", "inner rate", "second rate", "by seed", "test", "beyond MAML", "seconds"]
        text += [
            f"\nTest accuracy (%) over {TEST_TASKS} tasks after {study.iterations} iterations:\n",
            markdown_table(header, tested(study, results)),
        ]
    return "\n".join(text)


def tested(study: Study, results: Results) -> list[list[str]]:
    """A row per method and shots, over the seeds that the method and MAML have."""
    rows = []
    for shots in study.shots:
        done = [one for one in study.in_full(results) if one.shots == shots and one in results]
        means = {(one.method, one.seed): statistics.fmean(results[one]["test"]) for one in done}
        for method in METHODS:
            ours = [one for one in done if one.method == method and ("MAML", one.seed) in means]
            if not ours:
                continue
            values = [means[method, one.seed] for one in ours]
            differences = [means[method, one.seed] - means["MAML", one.seed] for one in ours]
            rows.append([
                method,
                str(shots),
                str(ours[0].inner_rate),
                str(ours[0].second_rate or ""),
                " ".join(f"{value:.1f}" for value in values),
                mean_and_interval(values, 2),
                "" if method == "MAML" else mean_and_interval(differences, 2),
                f"{statistics.fmean(results[one]['seconds'] for one in ours):.0f}",
            ])  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--iterations", type=int, default=Study._field_defaults["iterations"])
    parser.add_argument("--search", type=int, default=Study._field_defaults["search"], help="iterations of the search")
    parser.add_argument("--shots", nargs="+", type=int, default=Study._field_defaults["shots"])
    chosen = parser.parse_args()
    study = Study(chosen.search, chosen.iterations, tuple(chosen.shots))
    print(tables(study, work(study, chosen.minutes)))


if __name__ == "__main__":
    main()
