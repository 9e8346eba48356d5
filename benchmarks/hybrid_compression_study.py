"""Accuracy within a FLOPs budget, compared with Torch-Pruning: networks, data sets, budgets and training seeds.

All runs have the same number of steps and learning rate schedule and deliver a network within the same fraction of the
dense network's FLOPs. Torch-Pruning removes channels after two fifths of the training, the same fraction from all
layers (its default), the smallest that meets the budget, and fine-tunes for the rest with a fresh optimizer:
"Torch-Pruning, magnitude" by the norms of weights, "Torch-Pruning, BN" by the scales of batch norms; "global" ranks the
channels of all layers together and leaves each layer a twentieth. "Model-Optimizer, FastNAS" searches for numbers of
channels at the same time, by the accuracy on the training images, and needs that package.

The digits are those of scikit-learn; the glyphs are thirty characters, drawn by the seed, in the fonts shipped with
matplotlib, rotated, scaled and shifted at random. The seed determines the training images, the initial network and the
order of the batches, the same for all methods; differences are paired by seed.

    python benchmarks/hybrid_compression_study.py                      # what is missing, and the page
    python benchmarks/hybrid_compression_study.py --minutes 10         # as much as begins within ten minutes
    python benchmarks/hybrid_compression_study.py --networks resnet18 --budgets 0.5

With ", trained" behind a network's name it starts from weights of a dense training of 36 epochs on the same images, and
Torch-Pruning removes channels before the first step.

Results of every run are stored in a file and reused, so that an interrupted study can be continued.
"""

import argparse
import functools
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _report import describe_machine, markdown_table, mean_and_interval
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_plugins.callbacks import HybridCompression, MaskScheduling, RankScheduling
from lightning_plugins.compression import ChoiceRates
from lightning_plugins.meta import GlyphFewShot

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from digits import Classifier, Digits

STORE = ROOT / "docs" / "benchmarks" / "hybrid_compression.json"
TRAIN, BATCH = 600, 100
AT = 0.4  # when Torch-Pruning removes channels, as a fraction of the training
TRAINED, BEFORE = ", trained", 36  # a start from trained weights, and the epochs of that training
METHODS = (
    "hybrid",
    "ranks",
    "masks",
    "masks, magnitude",
    "Torch-Pruning, magnitude",
    "Torch-Pruning, BN",
    "Torch-Pruning, magnitude, global",
    "Model-Optimizer, FastNAS",
)


def digits(seed: int) -> tuple[Dataset, Dataset]:
    """Training images, drawn by seed, and all other images."""
    whole = Digits()
    images = torch.cat([whole.train.tensors[0], whole.val.tensors[0]])
    labels = torch.cat([whole.train.tensors[1], whole.val.tensors[1]])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = (TensorDataset(images[part], labels[part]) for part in (order[:TRAIN], order[TRAIN:]))
    return train, test


def glyphs(seed: int) -> tuple[Dataset, Dataset]:
    """Twenty training images of each of thirty characters, and forty test images of each."""
    characters = GlyphFewShot("train", ways=30, shots=TRAIN // 30, queries=TRAIN // 15, jitter=1.5)
    parts = characters.sample(1, torch.Generator().manual_seed(seed))
    train, test = (TensorDataset(F.interpolate(2 * x[0] - 1, size=(32, 32), mode="bilinear"), y[0]) for x, y in parts)
    return train, test


DATA: dict[str, Callable[[int], tuple[Dataset, Dataset]]] = {"digits": digits, "glyphs": glyphs}
CLASSES = {"digits": 10, "glyphs": 30}


def loaders(data: str, seed: int) -> tuple[DataLoader, DataLoader]:
    train, test = DATA[data](seed)
    return DataLoader(train, BATCH, shuffle=True), DataLoader(test, 256)


def callback(method: str, budget: float) -> Callback:
    if method == "masks":
        return MaskScheduling("net.*", budget, figures=False)
    if method == "ranks":
        return RankScheduling("net.*", budget, figures=False, rates=ChoiceRates(refresh_every=4))
    if method == "masks, magnitude":
        return MaskScheduling("net.*", budget, figures=False, criterion="magnitude")
    return HybridCompression("net.*", budget, figures=False, rates=ChoiceRates(refresh_every=4))


def flops(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        model(model.example_input_array)
    return int(counter.get_total_flops())


def prune(model: Classifier, budget: float, method: str) -> None:
    """Remove channels with Torch-Pruning: the smallest equal fraction of all layers that meets the budget."""
    import copy

    import torch_pruning as tp

    dense = flops(model)

    def pruned(share: float) -> Classifier:
        smaller = copy.deepcopy(model)
        importance = tp.importance.BNScaleImportance() if "BN" in method else tp.importance.MagnitudeImportance()
        heads = [smaller.net.get_classifier()]
        inputs = smaller.example_input_array
        wholly = {"global_pruning": True, "max_pruning_ratio": 0.95} if method.endswith("global") else {}
        tp.pruner.BasePruner(
            smaller.net, inputs, importance=importance, pruning_ratio=share, ignored_layers=heads, **wholly
        ).step()
        return smaller

    low, high = 0.0, 0.98
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (low, middle) if flops(pruned(middle)) <= budget * dense else (middle, high)
    model.net = pruned(high).net


def search_with_fastnas(model: Classifier, budget: float, loader: DataLoader) -> None:
    """Remove channels with Model-Optimizer, by the accuracy on the training images, without rounding their numbers."""
    import contextlib
    import io
    import tempfile

    import modelopt.torch.prune as mtp
    from modelopt.torch.prune.fastnas import FastNASConfig

    settings = FastNASConfig().model_dump(by_alias=True)
    for rules in settings.values():
        for rule in rules.values():
            rule.update({key: 1 for key in rule or () if key.endswith("_divisor")})
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))

    def accuracy(network: nn.Module) -> float:
        network.eval()
        with torch.no_grad():
            return float((network(images).argmax(1) == labels).float().mean())

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        model.net, _ = mtp.prune(
            model.net,
            mode=[("fastnas", settings)],
            constraints={"flops": f"{100 * budget:g}%"},
            dummy_input=model.example_input_array,
            config={"data_loader": loader, "score_func": accuracy, "checkpoint": f"{folder}/search"},
        )


def fit_with_other(
    model: Classifier, loader: DataLoader, epochs: int, budget: float, method: str, at: float = AT
) -> None:
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
        if epoch == round(at * epochs):
            model.eval()
            if method.startswith("Torch-Pruning"):
                prune(model, budget, method)
            else:
                search_with_fastnas(model, budget, loader)
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


class Case(NamedTuple):
    """One training run."""

    data: str
    network: str
    method: str
    budget: float
    seed: int
    epochs: int

    @property
    def key(self) -> str:
        return " | ".join(map(str, self))


def fit(model: Classifier, loader: DataLoader, epochs: int, callbacks: list[Callback]) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", max_epochs=epochs, callbacks=callbacks, enable_checkpointing=False, **quiet).fit(
        model, loader
    )


@functools.lru_cache(maxsize=1)
def trained_weights(network: str, data: str, seed: int) -> dict[str, torch.Tensor]:
    """The weights after a dense training."""
    seed_everything(seed, verbose=False)
    model = Classifier(network, classes=CLASSES[data])
    fit(model, loaders(data, seed)[0], BEFORE, [])
    return model.state_dict()


def run(case: Case) -> dict[str, float]:
    """Accuracy, the remaining fraction of FLOPs, and the remaining channels and split layers."""
    network, trained = case.network.removesuffix(TRAINED), case.network.endswith(TRAINED)
    weights = trained_weights(network, case.data, case.seed) if trained else None
    loader, rest = loaders(case.data, case.seed)
    seed_everything(case.seed, verbose=False)
    model = Classifier(network, classes=CLASSES[case.data])
    if weights is not None:
        model.load_state_dict(weights)
    dense, begun = flops(model.eval()), time.process_time()
    model.train()
    found: dict[str, float] = {}
    if case.method.startswith(("Torch-Pruning", "Model-Optimizer")):
        fit_with_other(model, loader, case.epochs, case.budget, case.method, at=0.0 if trained else AT)
    else:
        callbacks = [] if case.method == "dense" else [callback(case.method, case.budget)]
        fit(model, loader, case.epochs, callbacks)
        if callbacks:
            report = callbacks[0].report
            kept = [(part.left, part.of) for part in report.kept.values()]
            if kept:
                found["units"] = sum(left for left, _ in kept) / sum(of for _, of in kept)
            found["split"] = len(report.ranks)
    seconds = time.process_time() - begun
    model.eval()
    with torch.no_grad():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in rest)
    return {"accuracy": right / len(rest.dataset), "share": flops(model) / dense, "seconds": seconds, **found}


Store = dict[str, dict[str, float]]


def row(store: Store, cases: list[Case], rivals: dict[int, float]) -> list[str]:
    """A row of the table.

    Args:
        store: Stored results.
        cases: The seeds of one setting.
        rivals: The best accuracy of Torch-Pruning by seed.
    """
    found = {case.seed: store[case.key] for case in cases if case.key in store}
    scores = {seed: 100 * one["accuracy"] for seed, one in found.items()}
    units = [100 * one["units"] for one in found.values() if "units" in one]
    both = sorted(set(scores) & set(rivals))
    lead = mean_and_interval([scores[seed] - rivals[seed] for seed in both], 1) if len(both) > 1 else "-"
    return [
        cases[0].method,
        f"{cases[0].budget:g}",
        f"{max(one['share'] for one in found.values()):.3f}",
        f"{statistics.mean(units):.0f}" if units else "-",
        mean_and_interval(list(scores.values()), 1),
        lead,
        str(len(found)),
        f"{statistics.mean(one['seconds'] for one in found.values()):.0f}",
    ]


def tables(store: Store, cases: list[Case]) -> str:
    """One table per network, data set and length of training."""
    parts = []
    for network, data, epochs in dict.fromkeys((case.network, case.data, case.epochs) for case in cases):
        here = [case for case in cases if case[:2] == (data, network) and case.epochs == epochs and case.key in store]
        rows = []
        order = ("dense", *METHODS)
        pairs = {(case.budget, case.method) for case in here}
        for budget, method in sorted(pairs, key=lambda pair: (-pair[0], order.index(pair[1]))):
            best: dict[int, float] = {}
            for case in here:
                if case.budget == budget and case.method.startswith("Torch-Pruning"):
                    best[case.seed] = max(best.get(case.seed, 0.0), 100 * store[case.key]["accuracy"])
            rows.append(row(store, [c for c in here if (c.budget, c.method) == (budget, method)], best))
        if rows:
            heads = ["method", "budget", "FLOPs left, at most", "channels left in %", "accuracy in %"]
            heads += ["minus the better Torch-Pruning", "seeds", "CPU seconds"]
            parts.append(f"**{network}, {data}, {epochs} epochs**\n\n{markdown_table(heads, rows)}")
    return "\n\n".join(parts)


TEXT = """# Channels, ranks or both within a budget: accuracy against Torch-Pruning

600 training images of ten digits or of thirty characters, batches of 100, AdamW under one cycle of its learning rate,
from scratch or, where the table says so, from the weights of a dense training of {before} epochs on the same images.
`HybridCompression` selects channels and ranks jointly, `RankScheduling` only ranks, `MaskScheduling` only channels
(learned, or by magnitude). Torch-Pruning removes the same fraction of channels from all layers after two fifths of the
training, or those ranked last overall ("global"); from trained weights it does so before the first step.
Model-Optimizer's FastNAS searches then for numbers of channels by the accuracy on the training images. Intervals are
95 % over training seeds. "Minus the better Torch-Pruning" compares seed by seed with the more accurate of its rows *for
that seed*, which favours Torch-Pruning; rows with fewer than five seeds are preliminary. The script is
`benchmarks/hybrid_compression_study.py`; its results are in `hybrid_compression.json`.

{machine}

{tables}
"""


def planned(options: argparse.Namespace) -> list[Case]:
    """Ordered by seed, so that an incomplete study is balanced."""
    return [
        Case(data, network, method, budget, seed, options.epochs)
        for seed in options.seeds
        for network in options.networks
        for data in options.data
        for budget, methods in [(1.0, ["dense"]), *((budget, options.methods) for budget in options.budgets)]
        for method in methods
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["test_resnet"])
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=list(DATA))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--epochs", type=int, default=36)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.3, 0.2])
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    kept: dict[str, Any] = json.loads(options.store.read_text()) if options.store.exists() else {"results": {}}
    store: Store = kept["results"]
    end = time.monotonic() + 60 * options.minutes
    for case in planned(options):
        if case.key not in store and time.monotonic() < end:
            store[case.key] = run(case)
            kept["machine"] = describe_machine("cpu")
            options.store.write_text(json.dumps(kept, indent=1) + "\n")
            print(case.key, store[case.key], flush=True)
    known = [Case(*_typed(key.split(" | "))) for key in store]
    page = TEXT.format(before=BEFORE, machine=kept["machine"], tables=tables(store, known))
    options.store.with_suffix(".md").write_text(page)
    print(page)


def _typed(parts: list[str]) -> tuple[str, str, str, float, int, int]:
    data, network, method, budget, seed, epochs = parts
    return data, network, method, float(budget), int(seed), int(epochs)


if __name__ == "__main__":
    main()
