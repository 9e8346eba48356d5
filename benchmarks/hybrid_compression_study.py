"""Accuracy within a budget of operations, against Torch-Pruning: several networks, data sets and training seeds.

Every training takes the same number of steps under one schedule of the learning rate and delivers a network within the
same share of the dense network's operations. Torch-Pruning removes channels at two fifths of the training, in even
shares of all layers (its default), the largest share that meets the budget, and fine-tunes for the rest with a fresh
optimizer: "Torch-Pruning, magnitude" by the norms of weights, "Torch-Pruning, BN" by the scales of batch norms.

    python benchmarks/hybrid_compression_study.py --networks test_resnet resnet18 --budgets 0.5 0.3

Every training's result is kept in a file and read from there, so that a run that was stopped goes on.
"""

import argparse
import json
import logging
import math
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from _report import describe_machine, markdown_table
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_plugins.callbacks import HybridCompression, MaskScheduling, RankScheduling

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from digits import Classifier, Digits

STORE = ROOT / "results" / "local" / "hybrid_compression_study.json"
TRAIN, BATCH = 600, 100
AT = 0.4  # where Torch-Pruning removes channels, as a share of the training
METHODS = (
    "hybrid",
    "ranks",
    "masks",
    "masks, magnitude",
    "Torch-Pruning, magnitude",
    "Torch-Pruning, BN",
)
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # two-sided, n seeds


def loaders(seed: int) -> tuple[DataLoader, DataLoader]:
    """Training images, drawn by the seed, and all the others."""
    digits = Digits()
    images = torch.cat([digits.train.tensors[0], digits.val.tensors[0]])
    labels = torch.cat([digits.train.tensors[1], digits.val.tensors[1]])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    parts = [TensorDataset(images[part], labels[part]) for part in (order[:TRAIN], order[TRAIN:])]
    return DataLoader(parts[0], BATCH, shuffle=True), DataLoader(parts[1], 256)


def callback(method: str, budget: float) -> Callback:
    if method == "masks":
        return MaskScheduling("net.*", budget)
    if method == "ranks":
        return RankScheduling("net.*", budget, refresh_every=4)
    if method == "masks, magnitude":
        return MaskScheduling("net.*", budget, criterion="magnitude")
    return HybridCompression("net.*", budget, refresh_every=4)


def flops(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        model(model.example_input_array)
    return int(counter.get_total_flops())


def prune(model: Classifier, budget: float, method: str) -> None:
    """Remove channels with Torch-Pruning: the smallest even share of all layers that meets the budget."""
    import copy

    import torch_pruning as tp

    dense = flops(model)

    def pruned(share: float) -> Classifier:
        smaller = copy.deepcopy(model)
        importance = tp.importance.BNScaleImportance() if method.endswith("BN") else tp.importance.MagnitudeImportance()
        heads = [m for m in smaller.net.modules() if isinstance(m, nn.Linear) and m.out_features == 10]
        inputs = smaller.example_input_array
        tp.pruner.BasePruner(
            smaller.net, inputs, importance=importance, pruning_ratio=share, ignored_layers=heads
        ).step()
        return smaller

    low, high = 0.0, 0.98
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (low, middle) if flops(pruned(middle)) <= budget * dense else (middle, high)
    model.net = pruned(high).net


def fit_with_torch_pruning(model: Classifier, loader: DataLoader, epochs: int, budget: float, method: str) -> None:
    steps, done = epochs * len(loader), 0

    def optimizer(first: int) -> tuple[Any, Any]:
        made = torch.optim.AdamW(model.parameters(), model.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(made, model.lr, total_steps=steps)
        for _ in range(first):
            made.step()
            schedule.step()
        return made, schedule

    model.train()
    current, schedule = optimizer(0)
    for epoch in range(epochs):
        if epoch == round(AT * epochs):
            model.eval()
            prune(model, budget, method)
            model.train()
            model.zero_grad()
            current, schedule = optimizer(done)
        for images, labels in loader:
            current.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            current.step()
            if done < steps - 1:
                schedule.step()
            done += 1
    model.eval()


def run(network: str, method: str, budget: float, seed: int, epochs: int) -> dict[str, float]:
    """Accuracy, the share of the operations that is left, and how much is left of channels and by ranks."""
    loader, rest = loaders(seed)
    seed_everything(seed, verbose=False)
    model = Classifier(network)
    dense, begun = flops(model.eval()), time.process_time()
    model.train()
    found: dict[str, float] = {}
    if method.startswith("Torch-Pruning"):
        fit_with_torch_pruning(model, loader, epochs, budget, method)
    else:
        callbacks = [] if method == "dense" else [callback(method, budget)]
        settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=False, **settings)
        trainer.fit(model, loader)
        if callbacks:
            report = callbacks[0].report
            kept = {name: (part.left, part.of) for name, part in report.kept.items()}
            found["units"] = sum(k for k, _ in kept.values()) / max(1, sum(of for _, of in kept.values()))
            found["split"] = len(report.ranks)
    seconds = time.process_time() - begun
    model.eval()
    with torch.no_grad():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in rest)
    return {"accuracy": right / len(rest.dataset), "share": flops(model) / dense, "seconds": seconds, **found}


def interval(scores: list[float]) -> str:
    mean = statistics.mean(scores)
    if len(scores) < 2:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {T_95.get(len(scores), 2.0) * statistics.stdev(scores) / math.sqrt(len(scores)):.1f}"


def table(store: dict[str, dict[str, float]], wanted: list[tuple[str, str, float]], options: Any) -> str:
    rows = []
    for network, method, budget in wanted:
        keys = [f"{network} {method} {budget} {seed} {options.epochs}" for seed in range(options.seeds)]
        found = [store[key] for key in keys if key in store]
        if found:
            scores = [100 * one["accuracy"] for one in found]
            units = [100 * one["units"] for one in found if "units" in one]
            left = f"{statistics.mean(units):.0f}" if units else "-"
            cells = [f"{budget:g}", f"{max(one['share'] for one in found):.3f}", left, interval(scores), len(scores)]
            rows.append([network, method, *cells, f"{statistics.mean(one['seconds'] for one in found):.0f}"])
    heads = ["network", "method", "budget", "operations left, at most", "channels left in %", "accuracy in %", "seeds"]
    return markdown_table([*heads, "CPU seconds"], [[str(cell) for cell in row] for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["test_resnet"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=36)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--store", type=Path, default=STORE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    store: dict[str, dict[str, float]] = json.loads(options.store.read_text()) if options.store.exists() else {}
    options.store.parent.mkdir(parents=True, exist_ok=True)
    wanted = [
        case
        for network in options.networks
        for case in [(network, "dense", 1.0), *((network, m, b) for b in options.budgets for m in options.methods)]
    ]
    for seed in range(options.seeds):
        for network, method, budget in wanted:
            name = f"{network} {method} {budget} {seed} {options.epochs}"
            if name not in store:
                store[name] = run(network, method, budget, seed, options.epochs)
                options.store.write_text(json.dumps(store, indent=1))
                print(name, store[name], flush=True)
    print(describe_machine("cpu"))
    print(table(store, wanted, options))


if __name__ == "__main__":
    main()
