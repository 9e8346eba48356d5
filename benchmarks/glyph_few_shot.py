"""Few-shot classification of glyphs with four preconditioners at equal budgets, over the same 600 test tasks.

All methods train a network of four strided convolutions on the same tasks, with the same inner steps and iterations.
First a short search at one shot tries rates of what the preconditioner learns, for GAP also with gains for the last
layer, and for MAML and GAP other inner learning rates. The setting with a method's highest accuracy on validation
tasks, of other characters, then trains longer, at one shot and at five, and is tested on tasks of still others.
Runs are kept in a file, and what is in it is not run again, so that the study may be interrupted.

    python benchmarks/glyph_few_shot.py                    # what is missing of the study, and its tables
    python benchmarks/glyph_few_shot.py --minutes 10       # as much as begins within ten minutes
    python benchmarks/glyph_few_shot.py --minutes 0        # the tables alone
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _report import describe_machine, markdown_table
from torch import nn

from lightning_plugins.meta import (
    GAP,
    ApproximateGAP,
    EpisodeLoader,
    GlyphFewShot,
    Identity,
    InnerLoop,
    MetaSGD,
    use_batch_statistics,
)

RESULTS = Path(__file__).parents[1] / "docs" / "benchmarks" / "glyphs.json"
METHODS = {"MAML": Identity, "Meta-SGD": MetaSGD, "GAP": GAP, "approximate GAP": ApproximateGAP}
INNER_RATES = (0.1, 0.4, 0.03)
SECOND_RATES = {"MAML": (0.0,), "Meta-SGD": (0.01, 0.05), "GAP": (0.01, 0.05), "approximate GAP": (0.05,)}
SEARCH, FULL = 200, 400  # iterations
WAYS, TRAINING_QUERIES, QUERIES = 5, 5, 15
STEPS, EVALUATION_STEPS = 3, 5
TASKS_PER_BATCH, VALIDATION_TASKS, TEST_TASKS = 4, 200, 600
CHANNELS, RATE = 32, 2e-3


class Setting(NamedTuple):
    method: str
    inner_rate: float
    second_rate: float  # Adam's, of what the preconditioner learns
    shots: int = 1
    iterations: int = SEARCH
    linear: bool = False  # whether GAP has gains for the last layer, too


Results = dict[Setting, dict[str, Any]]


def plan(results: Results) -> list[Setting]:
    """What is to be run, as far as it is known: the second rates, another inner rate with the best one, and in full."""
    first = INNER_RATES[0]
    settings = [Setting(method, first, rate) for method in METHODS for rate in SECOND_RATES[method]]
    settings.append(Setting("GAP", first, SECOND_RATES["GAP"][-1], linear=True))
    if all(setting in results for setting in settings):
        best = [best_of(method, results, settings) for method in ("MAML", "GAP")]
        settings += [setting._replace(inner_rate=rate) for rate in INNER_RATES[1:] for setting in best]
        if all(setting in results for setting in settings):
            settings += in_full(results, settings)
    return settings


def best_of(method: str, results: Results, settings: list[Setting]) -> Setting:
    """The method's setting with the highest accuracy in the search."""
    tried = [setting for setting in settings if setting.method == method and setting.iterations == SEARCH]
    return max(tried, key=lambda setting: results[setting]["validation"])


def in_full(results: Results, settings: list[Setting]) -> list[Setting]:
    """Every method's setting that was best in the search; those of the claim first."""
    best = [best_of(method, results, settings) for method in ("MAML", "GAP", "Meta-SGD", "approximate GAP")]
    pairs = (best[:2], best[2:])
    return [setting._replace(shots=shots, iterations=FULL) for pair in pairs for shots in (1, 5) for setting in pair]


def conv4() -> nn.Sequential:
    """Four strided convolutions with batch statistics: 28, 14, 7, 4 and 2 pixels wide."""
    blocks: list[nn.Module] = []
    for inputs in (1, CHANNELS, CHANNELS, CHANNELS):
        blocks += [nn.Conv2d(inputs, CHANNELS, 3, stride=2, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU()]
    return use_batch_statistics(nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4 * CHANNELS, WAYS)))


def train(setting: Setting) -> InnerLoop:
    torch.manual_seed(0)
    network = conv4()
    preconditioner = GAP(linear=True) if setting.linear else METHODS[setting.method]()
    loop = InnerLoop(network, F.cross_entropy, preconditioner, steps=STEPS, learning_rate=setting.inner_rate)
    groups = [{"params": network.parameters()}, {"params": preconditioner.parameters(), "lr": setting.second_rate}]
    optimizer = torch.optim.Adam(groups, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.iterations)
    tasks = GlyphFewShot("train", WAYS, setting.shots, TRAINING_QUERIES)
    for support, query in EpisodeLoader(tasks, setting.iterations * TASKS_PER_BATCH, TASKS_PER_BATCH):
        episodes = loop(support, query)
        optimizer.zero_grad()
        episodes.loss.backward()
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
    result["validation"] = statistics.fmean(accuracies(loop, setting.shots, "val", VALIDATION_TASKS))
    if setting.iterations == FULL:
        result["test"] = accuracies(loop, setting.shots, "test", TEST_TASKS)
    if isinstance(loop.preconditioner, GAP | ApproximateGAP):
        gains = loop.preconditioner.gains()
        result["gains"] = {name: [round(value, 3) for value in gain.tolist()] for name, gain in gains.items()}
    return result


def load() -> Results:
    entries = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return {Setting(*entry["setting"]): entry["result"] for entry in entries}


def keep(results: Results) -> None:
    entries = [json.dumps({"setting": setting, "result": result}) for setting, result in results.items()]
    RESULTS.write_text("[\n" + ",\n".join(entries) + "\n]\n")


def work(minutes: float) -> Results:
    """Run what is missing, as long as there is time to begin."""
    end = time.monotonic() + 60 * minutes
    results = load()
    while missing := [setting for setting in plan(results) if setting not in results]:
        if time.monotonic() > end:
            print(f"{len(missing)} runs or more are missing")
            break
        results[missing[0]] = run(missing[0])
        print(*missing[0], results[missing[0]]["validation"], results[missing[0]]["seconds"], flush=True)
        keep(results)
    return results


def interval(values: list[float]) -> str:
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):.2f} ± {half:.2f}"


def name_of(setting: Setting) -> str:
    return setting.method + (", last layer too" if setting.linear else "")


def tables(results: Results) -> str:
    search = [setting for setting in plan(results) if setting.iterations == SEARCH and setting in results]
    rows = [
        [
            name_of(setting),
            f"{setting.inner_rate}",
            f"{setting.second_rate or ''}",
            f"{results[setting]['validation']:.1f}",
        ]
        for setting in search
    ]
    text = [
        f"Validation accuracy (%) over {VALIDATION_TASKS} tasks after {SEARCH} iterations, one shot:\n",
        markdown_table(["method", "inner rate", "second rate", "validation"], rows),
        f"\nTest accuracy (%) over {TEST_TASKS} tasks after {FULL} iterations:\n",
        markdown_table(
            ["method", "shots", "inner rate", "second rate", "test", "beyond MAML", "seconds"], tested(results)
        ),
    ]
    return "\n".join(text)


def tested(results: Results) -> list[list[str]]:
    settings = [setting for setting in plan(results) if setting.iterations == FULL and setting in results]
    rows = []
    for setting in sorted(settings, key=lambda setting: setting.shots):
        maml = next(one for one in settings if one.method == "MAML" and one.shots == setting.shots)  # the best one
        differences = [a - b for a, b in zip(results[setting]["test"], results[maml]["test"], strict=True)]
        rows.append([
            name_of(setting),
            str(setting.shots),
            str(setting.inner_rate),
            str(setting.second_rate or ""),
            interval(results[setting]["test"]),
            "" if setting == maml else interval(differences),
            f"{results[setting]['seconds']:.0f}",
        ])  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=math.inf)
    results = work(parser.parse_args().minutes)
    print(tables(results))


if __name__ == "__main__":
    main()
