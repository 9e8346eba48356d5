"""Overhead of penalties on all weights of a network in a training step, and the error of their gradients.

In one training run of a ResNet-18 every form of `StableRankRegularization` runs at every step, one after the other,
together with the gradient from a full singular value decomposition of each weight. Drift of the machine's speed thus
affects all equally, and weights change as with a usual learning rate. Times are CPU times (wall-clock times on a GPU).

    python benchmarks/stable_rank.py                   # ResNet-18, 32 x 3 x 224 x 224, one thread
    python benchmarks/stable_rank.py --device cuda     # ResNet-50, 256 x 3 x 224 x 224, bf16-mixed
"""

import argparse
import itertools
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Iterator
from typing import Any

import timm
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_plugins.callbacks.stable_rank import StableRankRegularization
from lightning_plugins.functional.stable_rank import exact_gradient
from lightning_plugins.weights import WeightMatrix, select_targets

WEIGHT = 1e-3
FORMS: dict[str, dict[str, Any]] = {
    "stable rank": {},
    "p=2, a tenth of the rank": {"rank": 0.1, "p": 2},
    "p=2, a quarter of the rank": {"rank": 0.25, "p": 2},
    "p=1, a quarter of the rank": {"rank": 0.25, "p": 1},
}


class Classifier(LightningModule):
    def __init__(self, name: str, rate: float) -> None:
        super().__init__()
        self.backbone = timm.create_model(name, num_classes=1000)
        self.rate = rate

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.backbone(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9, weight_decay=1e-4)


class Repeats:
    """A loader of the same batch, many times."""

    def __init__(self, batch: tuple[Tensor, Tensor], times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.repeat(self.batch, self.times)


class Timed(StableRankRegularization):
    """Times itself, and compares its gradient with the exact one in float64."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.seconds: list[float] = []
        self.errors: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        weights = [weight.tensor for weight in self._in_use._found]
        gradients = [weight.grad for weight in weights]
        for weight in weights:
            weight.grad = torch.full_like(weight, 0.0)  # zeros would be paged in only when added to
        start = now(pl_module)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self.seconds.append(now(pl_module) - start)
        self.errors.append(max(self.error_of(weight, self._ranks[weight.label]) for weight in self._in_use._found))
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient + weight.grad

    def error_of(self, weight: WeightMatrix, rank: int | None) -> float:
        matrix = weight.take(weight.tensor.detach()).double()
        exact = WEIGHT * exact_gradient(matrix, *((1, 2) if rank is None else (rank, self.p))).gradient
        return float((weight.take(weight.tensor.grad).double() - exact).norm() / exact.norm())


class Decomposes(Callback):
    """The same gradient of a quarter of the rank, from a singular value decomposition of each weight."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        targets = select_targets(pl_module, "*", rank=0.25)
        start = now(pl_module)
        for weight, rank in targets:
            u, s, v = torch.linalg.svd(weight.take(weight.tensor.detach()), full_matrices=False)
            head, tail = s[:rank].sum(), s[rank:].sum()
            slopes = torch.where(torch.arange(len(s), device=s.device) < rank, -tail / head**2, 1 / head)
            weight.tensor.grad.add_(weight.put((u * slopes) @ v), alpha=WEIGHT)
        self.seconds.append(now(pl_module) - start)


class TimesSteps(Callback):
    """Times forward and backward; must be the first callback."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._start = now(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.seconds.append(now(pl_module) - self._start)


def now(pl_module: LightningModule) -> float:
    if pl_module.device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=8, help="counted steps")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate")
    settings = parser.parse_args()
    on_gpu = settings.device == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)  # or the time of threads that wait counts too
    name, batch_size, precision = ("resnet50", 256, "bf16-mixed") if on_gpu else ("resnet18", 32, "32-true")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")

    torch.manual_seed(0)
    images, labels = torch.randn(batch_size, 3, 224, 224), torch.randint(1000, (batch_size,))
    if on_gpu:
        images, labels = images.cuda(), labels.cuda()
    forms = {label: Timed(layers="*", weight=WEIGHT, **form) for label, form in FORMS.items()}
    decomposes = Decomposes()
    steps = TimesSteps()
    trainer = Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=1,
        precision=precision,  # type: ignore[arg-type]  # one of the literals that it takes
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[steps, *forms.values(), decomposes],
    )
    warm_up = 2
    trainer.fit(Classifier(name, settings.rate), Repeats((images, labels), settings.steps + warm_up))

    step = statistics.median(steps.seconds[warm_up:])
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {settings.device}")
    print(f"\n{name}, {batch_size} x 3 x 224 x 224, {precision}, learning rate {settings.rate}: a step (forward and")
    print(
        f"backward) takes {1e3 * step:.0f} ms. Medians of {settings.steps} steps; the largest error of all weights.\n"
    )
    print("| penalty on all weights | ms | share of a step | largest error of the gradient |")
    print("|---|---|---|---|")
    for label, timed in (*forms.items(), ("p=1, full singular value decompositions", decomposes)):
        median = statistics.median(timed.seconds[warm_up:])
        error = f"{max(timed.errors[warm_up:]):.2%}" if isinstance(timed, Timed) else ""
        print(f"| {label} | {1e3 * median:.0f} | {median / step:.1%} | {error} |")


if __name__ == "__main__":
    main()
