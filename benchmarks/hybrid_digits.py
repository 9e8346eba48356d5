"""Accuracy within a budget of operations, on handwritten digits: filters, ranks, both, and magnitudes.

All train for as many steps under one schedule of the learning rate, and deliver a network within the same budget.
"without scheduling" is the hybrid with masks as steep as they ever get from the beginning.

    python benchmarks/hybrid_digits.py                          # a small ResNet, three seeds, budget 0.3
    python benchmarks/hybrid_digits.py --budgets 0.5 0.3 0.15   # several

Every training's result is kept in a file and read from there, so that a run that was stopped goes on.
"""

import argparse
import json
import logging
import statistics
import sys
import warnings
from pathlib import Path

import torch
from _report import describe_machine, markdown_table
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_plugins.callbacks import HybridCompression, MaskScheduling, RankScheduling
from lightning_plugins.schedules import Constant

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from digits import Classifier, Digits

STORE = ROOT / "results" / "local" / "hybrid_digits.json"
LAYERS = "net.*"


def make(method: str, budget: float) -> Callback:
    if method == "filters":
        return MaskScheduling(LAYERS, budget, figures=False)
    if method == "ranks":
        return RankScheduling(LAYERS, budget, figures=False, refresh_every=4)
    if method == "magnitude":
        return MaskScheduling(LAYERS, budget, figures=False, criterion="magnitude", update_every=20)
    schedule = Constant(1.0) if method == "without scheduling" else None
    return HybridCompression(LAYERS, budget, figures=False, refresh_every=4, schedule=schedule)


METHODS = ("hybrid", "filters", "ranks", "magnitude", "without scheduling")


def run(method: str, budget: float, seed: int, epochs: int) -> dict[str, float]:
    """Accuracy, and the share of the operations that is left."""
    seed_everything(seed, verbose=False)
    callbacks = [] if method == "dense" else [make(method, budget)]
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=False, **settings)
    model, data = Classifier(), Digits()
    trainer.fit(model, data.train_dataloader())
    (metrics,) = Trainer(**settings).validate(model, data.val_dataloader(), verbose=False)
    kept = 1.0
    if method != "dense":
        kept = callbacks[0].report.share
    return {"accuracy": metrics["accuracy"], "kept": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.3])
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    store: dict[str, dict[str, float]] = json.loads(STORE.read_text()) if STORE.exists() else {}
    STORE.parent.mkdir(parents=True, exist_ok=True)
    wanted = [("dense", 1.0), *((method, budget) for budget in options.budgets for method in METHODS)]
    for seed in range(options.seeds):
        for method, budget in wanted:
            name = f"{method} {budget} {seed} {options.epochs}"
            if name not in store:
                store[name] = run(method, budget, seed, options.epochs)
                STORE.write_text(json.dumps(store, indent=1))
                print(name, store[name], flush=True)
    rows = []
    for method, budget in wanted:
        found = [store[f"{method} {budget} {seed} {options.epochs}"] for seed in range(options.seeds)]
        scores = [100 * one["accuracy"] for one in found]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        largest = max(one["kept"] for one in found)
        rows.append([method, f"{budget:g}", f"{largest:.4f}", f"{statistics.mean(scores):.1f} ± {spread:.1f}"])
    print(describe_machine("cpu"))
    print(markdown_table(["method", "budget", "operations left, at most", "accuracy in %"], rows))


if __name__ == "__main__":
    main()
