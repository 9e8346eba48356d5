"""Small modules and loaders that the callback tests share."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins._lightning import LightningModule, Trainer  # the contract runs with both packages


class Classifier(LightningModule):
    """Two linear layers and a head; the loss is a sum over the batch, so that unequal batches add up over ranks."""

    def __init__(self, features: int = 6, *, width: int = 5, lr: float = 0.1, optimizer: str = "sgd") -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(features, 8), nn.Tanh(), nn.Linear(8, width))
        self.head = nn.Linear(width, 3)
        self.lr, self.optimizer = lr, optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="sum") / 8

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=self.lr)
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Batches:
    """A loader over prepared batches that resumes in the middle of an epoch, and shards by rank where it is told to."""

    def __init__(self, batches: Sequence[Sequence[Tensor]]) -> None:
        self.batches = list(batches)
        self.position = 0  # batches handed out in this epoch
        self.start = 0  # where the next epoch begins: behind 0 only after a checkpoint was loaded

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Sequence[Tensor]]:
        start, self.start = self.start, 0
        for index in range(start, len(self.batches)):
            self.position = index + 1
            yield self.batches[index]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["position"] % len(self.batches)  # behind the last batch begins a new epoch


def make_batches(count: int = 4, size: int = 8, *, features: int = 6, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Random batches of a three-class problem, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, size, features)
    x, y = torch.randn(shape, generator=generator), torch.randint(3, shape[:2], generator=generator)
    return list(zip(x, y, strict=True))


def shard(batches: Sequence[Sequence[Tensor]], bounds: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """This rank's rows of every batch: rank r takes rows ``bounds[r]:bounds[r + 1]``."""
    rank = int(os.environ.get("RANK", "0"))
    rows = slice(bounds[rank], bounds[rank + 1])
    return [tuple(part[rows] for part in batch) for batch in batches]


def fit(model: LightningModule, batches: Sequence[Any], callbacks: Any = (), **settings: Any) -> Trainer:
    """Fit without files or bars; `validation` is a loader, `ckpt_path` a checkpoint, the rest goes to the Trainer."""
    ckpt_path, validation = settings.pop("ckpt_path", None), settings.pop("validation", None)
    loader = batches if isinstance(batches, Batches) else Batches(batches)
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "precision": "64-true",
    }
    trainer = Trainer(**{**defaults, **settings}, callbacks=list(callbacks))
    trainer.fit(model, loader, validation, ckpt_path=ckpt_path)
    return trainer


def without_hooks(model: nn.Module) -> bool:
    """Tell whether no module has a hook around its forward pass."""
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def entropy_by_autograd(embeddings: Tensor) -> Tensor:
    """An independent reference for well-conditioned batches: autograd through the eigenvalues of ``Z.T @ Z / N``."""
    z = embeddings / embeddings.norm(dim=1, keepdim=True)
    spectrum = torch.linalg.eigvalsh(z.T @ z / len(z)).flip(0)[: min(z.shape)]
    return -(spectrum * spectrum.log()).sum()
