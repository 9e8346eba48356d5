"""Self-supervised training on two processes that collapses without VNERegularization and learns with it.

    python examples/demo.py

Two views of a digit are pulled together, with no negatives, no teacher and no stop-gradient: the loss is at its best
where all digits have one and the same representation. The callback raises the entropy of the representation instead.
Everything that lightning_plugins needs is in `train`: callbacks in the list of an ordinary Trainer.
"""

import logging
import os
import tempfile
import warnings
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins.callbacks import (
    CollapseAlarm,
    CollapseLimits,
    LayerProbe,
    RepresentationMonitor,
    VNERegularization,
)
from lightning_plugins.plots import spectrum_comparison_figure

SHORT = "EXAMPLE_STEPS" in os.environ  # the tests set 2
STEPS = int(os.environ.get("EXAMPLE_STEPS", "220"))  # 20 epochs of 11 batches of 2 x 64 digits
SEEDS = [0] if SHORT else [0, 1, 2]
WEIGHTS = {"without VNE": None, "weight=0.3": 0.3}


class Pull(LightningModule):
    """An encoder, a projector, and a loss that only pulls the views of a digit together."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(512, 128), nn.ReLU(),
        )  # fmt: skip
        self.projector = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.encoder(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        one, other = (self(moved(batch[0])) for _ in range(2))
        return 1 - F.cosine_similarity(one, other).mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def moved(images: Tensor) -> Tensor:
    """Each image shifted, scaled and rotated at random, with noise."""
    n = len(images)
    angle, scale = 0.35 * (2 * torch.rand(n) - 1), 0.8 + 0.4 * torch.rand(n)
    shift = 0.25 * (2 * torch.rand(n, 2) - 1)
    rows = [
        torch.stack([angle.cos() * scale, -angle.sin() * scale, shift[:, 0]], dim=1),
        torch.stack([angle.sin() * scale, angle.cos() * scale, shift[:, 1]], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False) + 0.1 * torch.randn_like(images)


def loaders() -> tuple[DataLoader, DataLoader]:
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images[order] / 8 - 1, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits.target[order])
    train, val = (TensorDataset(images[part], labels[part]) for part in (slice(0, 1437), slice(1437, None)))
    return DataLoader(train, 64, shuffle=True, drop_last=True), DataLoader(val, 180)


class Advance(Callback):
    """Moves the progress bar."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar

    def on_train_batch_end(self, *args: Any) -> None:
        self.bar.advance(self.bar.task_ids[0])


def train(seed: int, weight: float | None, bar: Progress) -> dict[str, Any]:
    """Train and validate once. Both processes call this with the same arguments, and get the same numbers."""
    seed_everything(seed, verbose=False)
    model = Pull()
    monitor = RepresentationMonitor("projector", metrics=["entropy", "effective_rank"], figures=False)
    probe = LayerProbe(
        "encoder", 1, probe={"task": "classification", "num_targets": 10}, stages=["val"], figures=False
    )  # reads the digit from the frozen features, with no learning rate
    alarm = CollapseAlarm("projector", limits=CollapseLimits(minimum=2.0, patience=3), every_n_steps=10)
    callbacks: list[Callback] = [monitor, probe, alarm, Advance(bar)]
    if weight is not None:
        callbacks.append(VNERegularization("projector", weight))
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=-1,
        max_steps=STEPS,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,  # one bar for all runs instead
    )
    train_loader, val_loader = loaders()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, train_loader)
    (metrics,) = trainer.validate(model, val_loader, verbose=False)
    return {
        "accuracy": metrics["probe/val/encoder/accuracy"],
        "entropy": metrics["representation/val/projector/entropy"],
        "effective_rank": metrics["representation/val/projector/effective_rank"],
        "alarm": next((str(w.message).split(";")[0] for w in caught if "projector" in str(w.message)), ""),
        "spectrum": monitor.spectra["val"]["projector"][trainer.global_step],
    }


@rank_zero_only
def report(runs: dict[str, list[dict[str, Any]]]) -> None:
    table = Table(title=f"Validation on 360 digits, seeds {SEEDS}: mean ± standard deviation")
    for column in ("", "linear probe, %", "entropy, nats", "effective rank of 64", "alarms"):
        table.add_column(column, justify="right" if column else "left")
    for name, results in runs.items():
        cells = []
        for key, scale, digits in (("accuracy", 100, 1), ("entropy", 1, 2), ("effective_rank", 1, 1)):
            values = [scale * run[key] for run in results]
            cells.append(f"{mean(values):.{digits}f} ± {pstdev(values):.{digits}f}")
        table.add_row(name, *cells, str(sum(bool(run["alarm"]) for run in results)))
    Console().print(table)
    for alarm in {run["alarm"] for results in runs.values() for run in results if run["alarm"]}:
        print(f"alarm: {alarm}")
        break
    spectra = {name: results[0]["spectrum"] for name, results in runs.items()}
    folder = Path(os.environ.get("EXAMPLE_OUTPUT") or ("demo_output" if not SHORT else tempfile.mkdtemp()))
    folder.mkdir(exist_ok=True)
    path = folder / "demo_spectrum.png"
    spectrum_comparison_figure(spectra, title="Validation features of seed 0").savefig(path, dpi=150)
    print(f"figure: {path}")


def main() -> None:
    torch.set_num_threads(1)  # two processes on two cores
    for package in ("lightning.pytorch", "lightning.fabric"):  # the table is to be the last word
        logging.getLogger(package).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")  # about loaders without workers, which memory does not need
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in WEIGHTS}
    with Progress(disable=rank_zero_only.rank != 0) as bar:
        bar.add_task("training", total=STEPS * len(WEIGHTS) * len(SEEDS))
        for seed in SEEDS:
            for name, weight in WEIGHTS.items():
                runs[name].append(train(seed, weight, bar))
    report(runs)


if __name__ == "__main__":  # the second process runs this file too
    main()
