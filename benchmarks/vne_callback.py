"""Time that `VNERegularization` adds to a training step, measured inside one run.

Every second step carries the term (``every_n_steps=2``), so that steps with and without it alternate and drift of the
machine's speed falls on both alike. Beside the whole steps the term is timed alone: its forward inside the step, and
its backward down to the captured layer. The last is the finer figure: whole steps scatter by more than the term costs.

    python benchmarks/vne_callback.py                      # ResNet-18, 32 x 3 x 224 x 224, float32, CPU
    python benchmarks/vne_callback.py --device cuda        # ResNet-50, 256 x 3 x 224 x 224, bf16-mixed
"""

import argparse
import logging
import statistics
import time
from typing import Any

import timm
import torch
from _report import describe_machine, markdown_table
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_plugins.callbacks import VNERegularization


class Classifier(LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.backbone = timm.create_model(name, num_classes=1000)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.backbone(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Timed(VNERegularization):
    """Times whole steps and, once per step that carries it, the term alone."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.seconds: dict[str, list[float]] = {"with": [], "without": [], "forward": [], "backward": []}
        self._extra = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._kind = "without" if trainer.global_step % self.every_n_steps else "with"
        self._extra, self._start = 0.0, self._now(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *arguments)
        self.seconds[self._kind].append(self._now(pl_module) - self._start - self._extra)

    def penalty(self, pl_module: LightningModule) -> Tensor | None:
        captured = {} if self._capture is None else self._capture._tensors
        tensors = [tensor for layer in captured.values() for tensor in layer]
        start = self._now(pl_module)
        penalty = super().penalty(pl_module)
        middle = self._now(pl_module)
        if penalty is not None:
            torch.autograd.grad(penalty, tensors, retain_graph=True)
            end = self._now(pl_module)
            self.seconds["forward"].append(middle - start)
            self.seconds["backward"].append(end - middle)
            self._extra = end - middle  # this extra backward is not part of the step
        return penalty

    @staticmethod
    def _now(pl_module: LightningModule) -> float:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=12, help="counted steps with the term, and as many without")
    settings = parser.parse_args()
    on_gpu = settings.device == "cuda"
    name, batch_size, precision = ("resnet50", 256, "bf16-mixed") if on_gpu else ("resnet18", 32, "32-true")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    torch.manual_seed(0)
    images, labels = torch.randn(batch_size, 3, 224, 224), torch.randint(1000, (batch_size,))
    if on_gpu:
        images, labels = images.cuda(), labels.cuda()  # the loader's part is not what is measured
    timed = Timed(layers="backbone.fc:input", weight=0.1, every_n_steps=2)
    trainer = Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=1,
        precision=precision,  # type: ignore[arg-type]  # one of the literals that it takes
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[timed],
    )
    warm_up = 2
    batches = [(images, labels)] * (2 * (settings.pairs + warm_up))
    trainer.fit(Classifier(name), DataLoader(batches, batch_size=None))

    median = {kind: statistics.median(values[warm_up:]) for kind, values in timed.seconds.items()}
    spread = {kind: statistics.quantiles(values[warm_up:], n=4) for kind, values in timed.seconds.items()}
    rows = [
        [label, f"{1e3 * median[kind]:.2f}", f"{1e3 * spread[kind][0]:.2f} to {1e3 * spread[kind][2]:.2f}"]
        for kind, label in (
            ("without", "step without the term"),
            ("with", "step with the term"),
            ("forward", "the term alone, forward"),
            ("backward", "the term alone, backward"),
        )
    ]
    print(describe_machine(settings.device))
    print(f"\n{name}, {batch_size} x 3 x 224 x 224, {precision}, medians of {settings.pairs} steps of each kind\n")
    print(markdown_table(["", "median ms", "middle half"], rows))
    share = (median["forward"] + median["backward"]) / median["without"]
    print(f"\nThe term's share of the step: {share:.2%}; whole steps: {median['with'] / median['without'] - 1:+.2%}")


if __name__ == "__main__":
    main()
