"""Trainings whose checkpoints older versions wrote, see `README.md`; runs with those versions and with this one."""

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_plugins import callbacks, compression, regularizers

EPOCHS, STEPS = 4, 4


class Net(LightningModule):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.example_input_array = torch.zeros(1, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Batches:
    """Prepared batches."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Return random batches, always the same."""
    generator = torch.Generator().manual_seed(0)
    shape = (STEPS, 8)
    x, y = torch.randn(*shape, 6, generator=generator), torch.randint(3, shape, generator=generator)
    return list(zip(x, y, strict=True))


def choosing(kind: str, budget: float, keep: str | None = None) -> Callback:
    """Choose from step 2 to step 7, with the arguments that the version has."""
    try:
        own = {"phase": callbacks.Phase(begin=2, end=7, unit="steps"), "limits": compression.Limits(keep=keep)}
    except AttributeError:
        own = {"begin": 2, "end": 7, "unit": "steps", "keep": keep}
    return getattr(callbacks, kind)("*", budget=budget, cost="params", figures=False, **own)


def low_rank() -> Callback:
    """Search ranks at step 2, and split behind step 8, with the arguments that the version has."""
    times = {"search_at": 2, "factorize_at": 7, "unit": "steps"}
    if hasattr(callbacks, "Timing"):
        own = {"budget": 0.7, "penalty": 0.1, "timing": callbacks.Timing(**times)}
    else:
        signature = inspect.signature(callbacks.LowRankCompression)
        share = {"budget": 0.7} if "budget" in signature.parameters else {"ratio": 0.3}
        own = {**share, "weight": 0.1, **times}
    return callbacks.LowRankCompression("*", search="energy", figures=False, **own)


MAKE: dict[str, Callable[[], Callback]] = {
    "CalibrationRecorder": callbacks.CalibrationRecorder,
    "CollapseAlarm": lambda: callbacks.CollapseAlarm("backbone", "effective_rank", 0.5, every_n_steps=2, queue_size=5),
    "Distillation": lambda: callbacks.Distillation(layers=["backbone"], weight=0.5),
    "EarlyTermination": lambda: callbacks.EarlyTermination("val_loss", history="curves.jsonl", total=1000),
    "HybridCompression": lambda: choosing("HybridCompression", 0.6, keep="head"),
    "LayerProbe": lambda: callbacks.LayerProbe("backbone", 1, stages=["train"], probe={"folds": 3}, figures=False),
    "LowRankCompression": low_rank,
    "MaskScheduling": lambda: choosing("MaskScheduling", 0.6, keep="head"),
    "MutualInformationMonitor": lambda: callbacks.MutualInformationMonitor(
        "backbone", pairs="halves", loss_candidates=8
    ),
    "RankScheduling": lambda: choosing("RankScheduling", 0.8),
    "RepresentationMonitor": lambda: callbacks.RepresentationMonitor(
        "backbone", every_n_steps=2, metrics=["entropy"], figures=False
    ),
    "RepresentationRegularization": lambda: callbacks.RepresentationRegularization(
        "backbone", regularizers.CodingRate(), weight=0.1, queue_size=5
    ),
    "SpectralNormCap": lambda: callbacks.SpectralNormCap("*", 0.5),
    "SpectrumMonitor": lambda: callbacks.SpectrumMonitor("*", every_n_steps=2, figures=False),
    "StableRankRegularization": lambda: callbacks.StableRankRegularization("*", weight=0.1, rank=2),
    "VNERegularization": lambda: callbacks.VNERegularization("backbone", weight=0.1, queue_size=5),
    "WeightRegularization": lambda: callbacks.WeightRegularization("*", regularizers.SoftOrthogonality(), weight=0.1),
}
SMALL = ("HybridCompression", "LowRankCompression", "MaskScheduling", "RankScheduling")


class Saving(Callback):
    """Saves at the ends of epochs, without a path of this machine in the file."""

    def __init__(self, files: dict[int, Path]) -> None:
        self.files = files

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch in self.files:
            trainer.save_checkpoint(self.files[trainer.current_epoch])


def train(model: LightningModule, callback: Callback, *more: Callback, ckpt_path: Path | None = None) -> Trainer:
    """Train for all epochs."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=EPOCHS, callbacks=[callback, *more], **quiet)
    trainer.fit(model, Batches(batches()), Batches(batches()[:1]), ckpt_path=ckpt_path)
    return trainer


def write(folder: Path) -> None:
    """Write the checkpoints of the version that is installed."""
    for name, make in MAKE.items():
        if not hasattr(callbacks, name):
            continue
        files = {0: folder / f"{name}.pt"} | ({2: folder / f"{name}-small.pt"} if name in SMALL else {})
        torch.manual_seed(0)
        train(Net(), make(), Saving(files))


if __name__ == "__main__":
    write(Path(sys.argv[1]).resolve())
