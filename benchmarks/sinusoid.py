"""The sinusoid table: adaptation of networks to a sinusoid from 5, 10 and 20 samples.

Every cell is one meta-training run, whose seed determines the initial network and the training tasks, evaluated on 600
other tasks, the same for all seeds. It is stored as a JSON file, so that an interrupted study can be continued. The
table is made from these files: if a method has several seeds, its interval is over them, otherwise over test tasks.

    python benchmarks/sinusoid.py                                         # all cells of five seeds, on two cores
    python benchmarks/sinusoid.py --methods MAML GAP --shots 5            # some
    python benchmarks/sinusoid.py --iterations 200 --folder /tmp/short    # a trial
    python benchmarks/sinusoid.py --table                                 # only print what is there
"""

import argparse
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from _report import describe_machine, markdown_table, mean_and_interval
from torch import nn

from lightning_plugins.meta import GAP, ApproximateGAP, Identity, InnerLoop, MetaSGD, Preconditioner, Sinusoid

ITERATIONS = 10_000
TASKS, QUERIES = 25, 15  # in one outer step; queries of one task
RATE, GAINS_RATE = 4e-3, 2e-2  # Adam's learning rates of the network and the preconditioner, with cosine decay to 0
CLIP = 2.0  # norm of the outer gradient
INNER_RATE = 0.01
RATES_RATE = 1e-3  # of Adam, for learned inner rates, which start at the inner rate
SEEDS, TEST_SEED = (0, 1, 2, 3, 4), 2
TEST_TASKS, TEST_QUERIES, TEST_STEPS = 600, 100, 10
SHOTS = (5, 10, 20)
STEPS = {"own": 5, "classical": 1}  # inner steps in training
PUBLISHED = {
    "MAML": ("1.13 ± 0.18", "0.77 ± 0.11", "0.48 ± 0.08"),
    "Meta-SGD": ("0.90", "0.53", "0.31"),
    "GAP": ("0.16 ± 0.04", "0.04 ± 0.01", "0.01 ± 0.01"),
}


def preconditioner(method: str, shots: int) -> Preconditioner:
    """A linear layer's gradient has at most the rank of the number of samples."""
    made: dict[str, Preconditioner] = {
        "MAML": Identity(),
        "MAML, learned rates": Identity(),  # one per adapted tensor
        "Meta-SGD": MetaSGD(),
        "GAP": GAP(linear=True, derivative="exact", rank=shots),
        "GAP, constant": GAP(linear=True, derivative="constant", rank=shots),
        "GAP, per step": GAP(linear=True, derivative="exact", rank=shots, per_step=True),
        "ApproximateGAP": ApproximateGAP(linear=True),
    }
    return made[method]


METHODS = ("MAML", "MAML, learned rates", "Meta-SGD", "ApproximateGAP", "GAP", "GAP, constant", "GAP, per step")
CELLS = [("own", method) for method in METHODS] + [("classical", method) for method in ("MAML", "GAP")]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def train(loop: InnerLoop, shots: int, iterations: int, seed: int, clip: float, say: str) -> list[float]:
    """Train the loop's parameters over tasks; returns the norms of the outer gradient before clipping."""
    tasks, generator = Sinusoid(shots, QUERIES), torch.Generator().manual_seed(seed)
    groups: list[dict[str, Any]] = [{"params": list(loop.model.parameters()), "lr": RATE}]
    if learned := list(loop.preconditioner.parameters()):
        groups.append({"params": learned, "lr": GAINS_RATE})
    if loop.rates:
        groups.append({"params": list(loop.rates.parameters()), "lr": RATES_RATE})
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    norms = []
    for iteration in range(iterations):
        episodes = loop(*tasks.sample(TASKS, generator))
        optimizer.zero_grad()
        episodes.loss.backward()
        norms.append(nn.utils.clip_grad_norm_(loop.parameters(), clip).item())
        if math.isfinite(norms[-1]):
            optimizer.step()
        schedule.step()
        if (iteration + 1) % max(1, iterations // 6) == 0:
            print(f"{say}: {iteration + 1} iterations, loss {episodes.loss.item():.3f}", flush=True)
    return norms


@torch.no_grad()
def curve(loop: InnerLoop, shots: int, seed: int) -> list[tuple[float, float]]:
    """Mean squared error and its 95 % interval over new tasks, after every number of inner steps from 0."""
    generator = torch.Generator().manual_seed(seed)
    batch = Sinusoid(shots, TEST_QUERIES).sample(TEST_TASKS, generator)
    losses = [loop(*batch, steps=steps).losses for steps in range(TEST_STEPS + 1)]
    return [(each.mean().item(), 1.96 * each.std().item() / math.sqrt(TEST_TASKS)) for each in losses]


def run_cell(cell: tuple[str, str, int, int], *, folder: Path, iterations: int, clip: float) -> None:
    """Train and evaluate, unless already done with the same settings."""
    setting, method, shots, seed = cell
    name = f"{setting}_{method}_{shots}" + (f"_seed_{seed}" if seed else "")
    path = folder / f"{name}.json".replace(", ", "_").replace(" ", "_").lower()
    settings = {"iterations": iterations, "seed": seed, "clip": clip}
    if path.exists() and json.loads(path.read_text())["settings"] == settings:
        return
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    loop = InnerLoop(
        network(),
        nn.functional.mse_loss,
        preconditioner(method, shots),
        steps=STEPS[setting],
        learning_rate=INNER_RATE,
        rates="learned" if method == "MAML, learned rates" else "fixed",
    )
    start = time.process_time()
    norms = torch.tensor(train(loop, shots, iterations, seed + 1, clip, ", ".join(map(str, cell))))
    seconds = time.process_time() - start
    gains = {}
    if hasattr(loop.preconditioner, "gains"):
        gains = {name: [round(gain, 3) for gain in each.tolist()] for name, each in loop.preconditioner.gains().items()}
    result = {
        "cell": cell[:3],
        "settings": settings,
        "curve": curve(loop, shots, TEST_SEED),
        "norms": {"median": norms.median().item(), "99%": norms.quantile(0.99).item(), "max": norms.max().item()},
        "gains": gains,
        "milliseconds": 1e3 * seconds / iterations,
        "where": describe_machine("cpu"),
    }
    partial_path = path.with_suffix(".part")
    partial_path.write_text(json.dumps(result, indent=1))
    partial_path.replace(path)


def table(folder: Path) -> str:
    """Return the table of the results in a folder."""
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        setting, method, shots = result["cell"]
        found.setdefault((setting, method, shots), []).append(result)
    lines = []
    for setting, method in CELLS:
        for steps in (TEST_STEPS,) if setting == "own" else (1, TEST_STEPS):
            cells = [found.get((setting, method, shots), []) for shots in SHOTS]
            cost = [f"{statistics.fmean(one['milliseconds'] for one in seeds):.0f}" for seeds in cells if seeds]
            counts = "/".join(str(len(seeds)) for seeds in cells)
            values = [_entry(seeds, steps) for seeds in cells]
            lines.append([method, f"{STEPS[setting]} / {steps}", counts, *values, " ".join(cost)])
    lines += [[f"{method}, published", "", "", *values, ""] for method, values in PUBLISHED.items()]
    header = ["method", "steps: training / test", "seeds", *(f"{shots} shots" for shots in SHOTS), "ms per iteration"]
    everything = [result for seeds in found.values() for result in seeds]
    settings = {json.dumps({k: v for k, v in one["settings"].items() if k != "seed"}) for one in everything}
    where = sorted({result["where"] for result in everything})
    return "\n".join([*where[-1:], f"settings: {' '.join(sorted(settings))}", "", markdown_table(header, lines)])


def _entry(seeds: Sequence[dict[str, Any]], steps: int) -> str:
    if len(seeds) == 1:
        return "{:.3f} ± {:.3f}".format(*seeds[0]["curve"][steps])
    return mean_and_interval([one["curve"][steps][0] for one in seeds], 3) if seeds else ""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--clip", type=float, default=CLIP, help="inf for none")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--settings", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--shots", nargs="+", type=int, choices=SHOTS, default=SHOTS)
    parser.add_argument("--folder", type=Path, default=Path(__file__).with_name("sinusoid"), help="of the results")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--table", action="store_true", help="run nothing")
    chosen = parser.parse_args(arguments)

    chosen.folder.mkdir(parents=True, exist_ok=True)
    if not chosen.table:
        pairs = [pair for pair in CELLS if pair[0] in chosen.settings and pair[1] in chosen.methods]
        cells = [(*pair, shots, seed) for seed, shots, pair in itertools.product(chosen.seeds, chosen.shots, pairs)]
        run = partial(run_cell, folder=chosen.folder, iterations=chosen.iterations, clip=chosen.clip)
        with ProcessPoolExecutor(chosen.processes, get_context("spawn")) as pool:
            list(pool.map(run, cells))
    print(table(chosen.folder))


if __name__ == "__main__":
    main()
