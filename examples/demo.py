"""Train a small network on two processes with and without VNERegularization, and compare.

    python examples/demo.py

Everything that lightning_plugins needs is in `train`: two callbacks in the list of an ordinary Trainer.
"""

import logging
import os
import time
import warnings
from statistics import mean, median, pstdev
from typing import Any

import torch
from digits import Classifier, Digits, show
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lightning_plugins.callbacks import RepresentationMonitor, VNERegularization
from lightning_plugins.plots import spectrum_comparison_figure

LAYER = "net.fc"  # its input is the representation
WEIGHTS = {"without VNE": None, "weight +0.2": 0.2, "weight -0.2": -0.2}
SHORT = "EXAMPLE_STEPS" in os.environ  # the tests set 2
STEPS = int(os.environ.get("EXAMPLE_STEPS", "120"))  # 10 epochs of 12 batches of 2 x 64 digits
SEEDS = [0] if SHORT else [0, 1, 2]


class StepTimer(Callback):
    """Takes the time of every step and moves the progress bar."""

    def __init__(self, bar: Progress) -> None:
        self.bar, self.seconds = bar, []

    def on_train_batch_start(self, *args: Any) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.bar.advance(self.bar.task_ids[0])


def train(seed: int, weight: float | None, bar: Progress, **vne: Any) -> dict[str, Any]:
    """Train and validate once. Both processes call this with the same arguments, and get the same numbers."""
    seed_everything(seed, verbose=False)
    model, data = Classifier(), Digits(batch_size=64)
    monitor = RepresentationMonitor(layers=f"{LAYER}:input", metrics=["entropy", "effective_rank"], figures=False)
    timer = StepTimer(bar)
    callbacks = [monitor, timer]
    if weight is not None:
        callbacks.append(VNERegularization(layers=f"{LAYER}:input", weight=weight, **vne))
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=10,
        max_steps=STEPS,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,  # one bar for all runs instead
    )
    trainer.fit(model, data.train_dataloader())
    (metrics,) = trainer.validate(model, data.val_dataloader(), verbose=False)
    return {
        "accuracy": metrics["accuracy"],
        "entropy": metrics[f"representation/val/{LAYER}/entropy"],
        "effective_rank": metrics[f"representation/val/{LAYER}/effective_rank"],
        "spectrum": monitor.spectra["val"][LAYER][trainer.global_step],
        "seconds": timer.seconds,
    }


def share_of_a_step(bar: Progress) -> float:
    """In one run every second step carries the term: compare each with the one after it, which does not."""
    seconds = train(seed=0, weight=0.2, bar=bar, every_n_steps=2)["seconds"]
    # an epoch's 12 batches begin with a slow one and end with a small one: their pairs are left out
    with_term = [step for step in range(0, len(seconds), 2) if step % 12 not in (0, 10)] or [0]
    return median(1 - seconds[step + 1] / seconds[step] for step in with_term)


@rank_zero_only
def report(runs: dict[str, list[dict[str, Any]]], share: float) -> None:
    table = Table(title=f"Validation on 360 digits, seeds {SEEDS}: mean ± standard deviation")
    for column in ("", "accuracy, %", "entropy, nats", "eff. rank", "ms/step", "share"):
        table.add_column(column, justify="right" if column else "left")
    for name, results in runs.items():
        cells = []
        for key, scale, digits in (("accuracy", 100, 1), ("entropy", 1, 2), ("effective_rank", 1, 1)):
            values = [scale * run[key] for run in results]
            cells.append(f"{mean(values):.{digits}f} ± {pstdev(values):.{digits}f}")
        milliseconds = 1e3 * median(second for run in results for second in run["seconds"])
        cells += [f"{milliseconds:.1f}", "-" if WEIGHTS[name] is None else f"{share:.1%}"]
        table.add_row(name, *cells)
    Console().print(table)
    print(
        "VNE's share of a step: from a further run in which every second step carries the term, median over the pairs."
    )
    spectra = {name: results[0]["spectrum"] for name, results in runs.items()}
    show(spectrum_comparison_figure(spectra, title="Validation features of seed 0"), "demo_spectrum")


def main() -> None:
    torch.set_num_threads(1)  # two processes on two cores
    for package in ("lightning.pytorch", "lightning.fabric"):  # the table is to be the last word
        logging.getLogger(package).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")  # about loaders without workers, which memory does not need
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in WEIGHTS}
    with Progress(disable=rank_zero_only.rank != 0) as bar:
        bar.add_task("training", total=STEPS * (len(WEIGHTS) * len(SEEDS) + 1))
        for seed in SEEDS:
            for name, weight in WEIGHTS.items():
                runs[name].append(train(seed, weight, bar))
        share = share_of_a_step(bar)
    report(runs, share)


if __name__ == "__main__":  # the second process runs this file too
    main()
