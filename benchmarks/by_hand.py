"""Accuracy within a budget: compression in a custom training loop against the callback.

By hand a module with `CompressionMixin` is trained without a Trainer: `attach_compression` before its optimizer is
made, `compression_schedule` before each forward pass and `compression_step` before each step of the optimizer, then
`compress` and a fresh optimizer. Both have the default rates and phases of `HybridCompression`, and network, digits,
learning rates, number of steps and what a seed chooses are those of `hybrid_compression_study.py`.

    python benchmarks/by_hand.py           # what is missing in docs/benchmarks/by_hand.json, the table, and the page
    python benchmarks/by_hand.py --page    # the page from what is stored
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from _report import describe_machine, markdown_table
from hybrid_compression_study import Classifier, flops, loaders
from lightning.pytorch import Trainer, seed_everything
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_plugins.callbacks import HybridCompression, Phase
from lightning_plugins.mixins import CompressionMixin

STORE = Path(__file__).parents[1] / "docs" / "benchmarks" / "by_hand.json"
BUDGET, EPOCHS = 0.3, 36
BEGIN, END = 0.1, 0.7  # the callback's defaults, in fractions of the training
METHODS = ("callback", "by hand")
Result = dict[str, float]


class ByHand(CompressionMixin, Classifier):
    """The same network, which can compress itself."""


def optimizer_of(model: Classifier, left_out: set[int], steps: int, done: int = 0) -> tuple[Any, Any]:
    """The optimizer of `Classifier` for a loop, with its schedule at the step that has been reached."""
    model.zero_grad()
    made = torch.optim.AdamW([p for p in model.parameters() if id(p) not in left_out], model.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(made, model.lr, total_steps=steps)
    for _ in range(done):
        made.step()  # without gradients: it changes nothing
        schedule.step()
    return made, schedule


def fit_by_hand(model: ByHand, loader: DataLoader) -> None:
    """Train, choose between `BEGIN` and `END` of the training, compress, and train on."""
    steps, done = EPOCHS * len(loader), 0
    chosen = {id(p) for p in model.attach_compression("net.*", budget=BUDGET, cost="flops")}
    optimizer, schedule, compressing = *optimizer_of(model, chosen, steps), True
    for _ in range(EPOCHS):
        for images, labels in loader:
            progress = (done / steps - BEGIN) / (END - BEGIN)
            if compressing and progress >= 1:
                compressing = False
                model.compress()
                optimizer, schedule = optimizer_of(model, set(), steps, done)
            if compressing:
                model.compression_schedule(max(progress, 0.0))
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            if compressing:
                model.compression_step()
            optimizer.step()
            done += 1
            if done < steps:
                schedule.step()


def fit_by_callback(model: Classifier, loader: DataLoader) -> None:
    phase = Phase(begin=BEGIN, end=END)
    compression = HybridCompression("net.*", BUDGET, cost="flops", phase=phase, figures=False)
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(max_epochs=EPOCHS, callbacks=[compression], enable_checkpointing=False, **settings).fit(model, loader)


def run(method: str, seed: int) -> Result:
    """Accuracy on the images that were not trained on, the share of the operations that is left, and CPU seconds."""
    loader, rest = loaders("digits", seed)
    seed_everything(seed, verbose=False)
    model = (Classifier if method == "callback" else ByHand)("test_resnet")
    dense, begun = flops(model.eval()), time.process_time()
    model.train()
    (fit_by_callback if method == "callback" else fit_by_hand)(model, loader)
    seconds = time.process_time() - begun
    model.eval()
    with torch.no_grad():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in rest)
    return {"accuracy": 100 * right / len(rest.dataset), "share": flops(model) / dense, "seconds": seconds}


def table(results: dict[str, Result], seeds: list[int]) -> str:
    """Accuracy by seed, and how far the mean is from the callback's."""
    rows = []
    for method in METHODS:
        found = [results[f"{method} | {seed}"] for seed in seeds]
        accuracies = [one["accuracy"] for one in found]
        apart = statistics.fmean(accuracies) - statistics.fmean(results[f"callback | {s}"]["accuracy"] for s in seeds)
        most, seconds = max(one["share"] for one in found), statistics.fmean(one["seconds"] for one in found)
        numbers = [*(f"{one:.1f}" for one in accuracies), f"{statistics.fmean(accuracies):.1f}"]
        numbers += ["" if method == "callback" else f"{apart:+.1f}", f"{most:.3f}", f"{seconds:.0f}"]
        rows.append([method, *numbers])
    heads = [*(f"seed {seed}" for seed in seeds), "mean", "minus the callback's", "FLOPs left, at most", "CPU seconds"]
    return markdown_table(["accuracy in %", *heads], rows)


TEXT = """# Compression by hand against the callback

`python benchmarks/by_hand.py`: {machine}.

600 of scikit-learn's digits for training and the others for the test, a small ResNet of timm, 36 epochs of six batches,
at most {budget} of the FLOPs. By hand: `CompressionMixin` in a training loop without a Trainer.

{table}

Only the callback transfers the optimizer state to the small network and resets the statistics of its norms; by hand a
new optimizer is created.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--page", action="store_true", help="write the page from the stored numbers alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    kept: dict[str, Any] = json.loads(STORE.read_text()) if STORE.exists() else {"results": {}}
    for seed in () if options.page else options.seeds:
        for method in METHODS:
            key = f"{method} | {seed}"
            if key not in kept["results"]:
                kept["results"][key] = run(method, seed)
                kept["machine"] = describe_machine("cpu")
                STORE.write_text(json.dumps(kept, indent=1) + "\n")
                print(key, kept["results"][key], flush=True)
    text = TEXT.format(machine=kept["machine"], budget=BUDGET, table=table(kept["results"], options.seeds))
    STORE.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
