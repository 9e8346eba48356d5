"""Handwritten digits, a small timm network and a place for figures, shared by the demo and the benchmarks.

The notebooks and their scripts need no other file.
"""

import sys
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

OUTPUT = Path("demo_output")


class Digits(LightningDataModule):
    """The 1797 digits that come with scikit-learn, enlarged; the last fifth is kept for validation."""

    def __init__(self, batch_size: int = 64, pixels: int = 32) -> None:
        super().__init__()
        images, labels = map(torch.tensor, load_digits(return_X_y=True))
        images = images.float().view(-1, 1, 8, 8) / 8 - 1  # from 0..16 to -1..1
        images = F.interpolate(images, size=(pixels, pixels), mode="bilinear")
        split = len(images) * 4 // 5
        self.train = TensorDataset(images[:split], labels[:split])
        self.val = TensorDataset(images[split:], labels[split:])
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size)


class Classifier(LightningModule):
    """A timm network and its cross-entropy; nothing in it knows of lightning_plugins."""

    def __init__(
        self, name: str = "test_resnet", channels: int = 1, classes: int = 10, lr: float = 4e-3, **settings: Any
    ) -> None:
        super().__init__()
        self.net = timm.create_model(name, in_chans=channels, num_classes=classes, **settings)
        self.accuracy = MulticlassAccuracy(classes, average="micro")
        self.lr = lr
        self.example_input_array = torch.zeros(1, channels, 32, 32)  # with which operations are counted

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def show(figure: Any, name: str) -> None:
    """Write a matplotlib figure to a file, say where it is, and in a notebook show it."""
    OUTPUT.mkdir(exist_ok=True)
    path = OUTPUT / f"{name}.png"
    figure.savefig(path)
    print(f"figure: {path.resolve()}")
    if "ipykernel" in sys.modules:
        from IPython.display import Image, display

        display(Image(path))
