"""Modules that write out what a callback does: the trainings that those of `tests.contract_table` have to equal."""

import copy
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.data import ObjectBank
from lightning_plugins.functional import RangeGrid
from lightning_plugins.transforms import BatchAugmentation
from tests.models import Classifier, entropy_by_autograd

RATE = 0.05  # small enough that rounding differences do not grow, as they do in a training that overshoots


class Model(Classifier):
    """Sees each batch in one or two views; its main loss adds up over ranks, although DDP averages gradients."""

    def __init__(
        self, *, views: int = 1, hidden: int = 8, width: int = 5, clouds: bool = False, **arguments: Any
    ) -> None:
        rate = RATE / 20 if arguments.get("optimizer") == "adamw" else RATE  # by which it changes any weight in a step
        super().__init__(lr=rate, width=width, **arguments)
        self.views, self.clouds = views, clouds
        if hidden != 8:
            self.backbone[0], self.backbone[2] = nn.Linear(6, hidden), nn.Linear(hidden, width)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return as_clouds(batch) if self.clouds else batch

    def loss(self, batch: Any) -> Tensor:
        return super().loss(from_clouds(batch) if isinstance(batch, dict) else batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = from_clouds(batch) if isinstance(batch, dict) else batch
        losses = [self.loss([view, batch[1]]) for view in self.views_of(batch)]
        return torch.stack(losses).sum() * self.trainer.world_size

    def views_of(self, batch: Sequence[Tensor]) -> list[Tensor]:
        return [batch[0], batch[0].flip(1)][: self.views]


def as_clouds(batch: Sequence[Tensor]) -> dict[str, Tensor]:
    """Each row of six numbers as two points of a cloud; without boxes."""
    x, y = batch
    points = torch.cat([x.reshape(-1, 2, 3), x.new_zeros(len(x), 2, 1)], dim=2)
    nothing = {"boxes": x.new_zeros(len(x), 1, 7), "labels": torch.full_like(y, -1)[:, None]}
    return {"points": points, "mask": torch.ones_like(points[..., 0], dtype=torch.bool), **nothing, "classes": y}


def from_clouds(batch: dict[str, Tensor]) -> list[Tensor]:
    """The rows again, with what has been inserted added to them."""
    kept = batch["points"][..., :3] * batch["mask"][..., None]
    return [kept[:, :2].flatten(1) + kept[:, 2:].sum(1).repeat(1, 2) / 40, batch["classes"]]


def tiny_bank() -> ObjectBank:
    """One object of 60 points."""
    points = torch.rand(60, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    points[:, :3] *= torch.tensor([4.0, 2.0, 1.5])
    return ObjectBank.from_frames([{"points": points, "boxes": [[0.0, 0, 0, 4, 2, 1.6, 0]], "labels": ["Car"]}])


CLOUDS: dict[str, Any] = {
    "targets": {"Car": 3},
    "grid": RangeGrid(rows=8, columns=64, lowest=-0.4, highest=0.4),
    "area": [[5.0, 20.0], [-9.0, 9.0]],
    "max_points": 50,
    "seed": 3,
}
BANK_FOLDER = tempfile.TemporaryDirectory()  # for YAML, which names a bank by its folder
BANK = tiny_bank()  # once: inside of a step of double precision `torch.rand` has other numbers
BANK.save(BANK_FOLDER.name)


class CloudsByHand(Model):
    """The augmentation called in the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        share = min(max((7 - self.global_step) / 5, 0.0), 1.0)
        augmented = BatchAugmentation(BANK, **CLOUDS)(batch, share=share, step=self.global_step)
        return super().training_step(augmented, batch_idx)


class ByHand(Model):
    """The entropy term written out in the step, through autograd of an eigendecomposition."""

    layers: tuple[str, ...] = ("head",)
    weight = 0.3
    queue_size = 0
    every_n_steps = 1

    def __init__(self, *, factor: Callable[[int, float], float] = lambda step, end: 1.0, **arguments: Any) -> None:
        own = {name: arguments.pop(name) for name in tuple(arguments) if hasattr(type(self), name)}
        super().__init__(**arguments)
        vars(self).update(own)
        self.factor = factor

    def on_train_start(self) -> None:
        self.memory: dict[str, Tensor] = {}

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_step % self.every_n_steps:
            return loss
        strength = (
            self.weight * self.every_n_steps * self.factor(self.global_step, self.trainer.estimated_stepping_batches)
        )
        for layer in self.layers:
            entropies = [self.entropy(layer, view) for view in self.views_of(batch)]
            loss = loss - strength * torch.stack(entropies).mean()
        return loss

    def entropy(self, layer: str, view: Tensor) -> Tensor:
        features = self.backbone[:2](view) if layer == "first" else self.backbone(view)
        with torch.autocast("cpu", enabled=False):
            rows = nn.functional.normalize(features.double() if features.dtype == torch.float64 else features.float())
            rows = torch.cat([self.memory.get(layer, rows[:0]), rows])
            if self.queue_size:
                self.memory[layer] = rows.detach()[-self.queue_size :]
            return entropy_by_autograd(rows)


class WeightsByHand(Model):
    """A term of the weights written out in the step, through autograd of singular values.

    Accumulated batches are averaged, so that a term in each of them counts once an optimizer step.
    """

    layers: tuple[str, ...] = ("backbone.0", "backbone.2", "head")
    weight = 0.3
    rank: int | None = None
    p = 1
    every_n_steps = 1

    def __init__(self, *, factor: Callable[[int, float], float] = lambda step, end: 1.0, **arguments: Any) -> None:
        own = {name: arguments.pop(name) for name in tuple(arguments) if hasattr(WeightsByHand, name)}
        super().__init__(**arguments)
        vars(self).update(own)
        self.factor = factor

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_step % self.every_n_steps:
            return loss
        strength = (
            self.weight * self.every_n_steps * self.factor(self.global_step, self.trainer.estimated_stepping_batches)
        )
        with torch.autocast("cpu", enabled=False):
            return loss + strength * sum(self.term(self.get_submodule(layer).weight) for layer in self.layers)

    def term(self, weight: Tensor) -> Tensor:
        s = torch.linalg.svdvals(weight.double())
        if self.rank is None:
            return (s**2).sum() / s[0] ** 2
        return (s[self.rank :] ** self.p).sum() / (s[: self.rank] ** self.p).sum()


class MeanSquare(nn.Module):
    """A term of a user's own, of embeddings or of weights, with its own buffer and no closed form."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(factor), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x.square().mean()


class EmbeddingsByHand(ByHand):
    """A term of embeddings written out in the step."""

    weight = -0.15  # `ByHand` subtracts an entropy

    @staticmethod
    def term(rows: Tensor) -> Tensor:
        z = nn.functional.normalize(rows)
        return -torch.logdet(torch.eye(z.shape[1]).to(z) + 2 * z.shape[1] / len(z) * z.T @ z) / 2

    def entropy(self, layer: str, view: Tensor) -> Tensor:
        features = self.backbone[:2](view) if layer == "first" else self.backbone(view)
        with torch.autocast("cpu", enabled=False):
            rows = features.double() if features.dtype == torch.float64 else features.float()
            rows = torch.cat([self.memory.get(layer, rows[:0]), rows])
            if self.queue_size:
                self.memory[layer] = rows.detach()[-self.queue_size :]
            return self.term(rows)


class CappedByHand(Model):
    """Weights scaled down after the optimizer's step by a singular value decomposition."""

    maximum = 0.5

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            for layer in (self.backbone[0], self.backbone[2], self.head):
                norm = torch.linalg.matrix_norm(layer.weight, 2)
                layer.weight.mul_((self.maximum / norm).clamp(max=1.0))


class DistilledByHand(Model):
    """The distance from a copy made at the start, written out in the step in float64."""

    weight = 0.3
    temperature = 1.0
    layers: tuple[int, ...] = ()

    def __init__(self, *, factor: Callable[[int, float], float] = lambda step, end: 1.0, **arguments: Any) -> None:
        own = {name: arguments.pop(name) for name in tuple(arguments) if hasattr(DistilledByHand, name)}
        super().__init__(**arguments)
        vars(self).update(own)
        self.factor = factor

    def on_fit_start(self) -> None:
        self.held = copy.deepcopy(nn.Sequential(self.backbone, self.head)).requires_grad_(False), None

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        terms = [self.distance(view) for view in self.views_of(batch)]
        strength = self.weight * self.factor(self.global_step, self.trainer.estimated_stepping_batches)
        return loss + strength * torch.stack(terms).mean()

    def distance(self, view: Tensor) -> Tensor:
        teacher = self.held[0]
        p = (teacher(view).double() / self.temperature).softmax(1)
        q = (self(view).double() / self.temperature).softmax(1)
        total = self.temperature**2 * (p * (p / q).log()).sum() / len(view)
        for layer in self.layers:
            one, other = self.backbone[: layer + 1](view), teacher[0][: layer + 1](view)
            total = total + ((one - other).double() ** 2).sum() / one.numel()
        return total.float() if view.dtype != torch.float64 else total
