"""GAP in a LightningModule: as a class of one's own in YAML, with drawn tasks, and on convolutions."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn

from lightning_plugins.data import EpisodicDataModule
from lightning_plugins.meta import GAP, use_batch_statistics
from lightning_plugins.metrics import FewShotAccuracy, FewShotAccuracyInterval
from lightning_plugins.mixins import GAPMixin, InnerSettings
from tests.mixins.few_shot import weights
from tests.models import Batches, fit

TRAINER = """
seed_everything: 0
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
data:
  train: {class_path: lightning_plugins.meta.Sinusoid}
  val: {class_path: lightning_plugins.meta.Sinusoid}
  episodes: {train: 12, val: 4, tasks_per_batch: 4}
"""
OWN = """
model:
  width: 3
  gain_rate: 0.01
"""
WHOLE = """
model:
  network:
    class_path: tests.mixins.test_gap.Net
    init_args: {width: 3}
  loss: torch.nn.functional.mse_loss
  preconditioner:
    class_path: lightning_plugins.meta.GAP
    init_args: {linear: true}
  inner: {steps: 2, evaluation_steps: 3, rates: learned, vectorize: {chunk_size: null}}
  preconditioner_learning_rate: 0.01
  step_weights: [0.5, 1.0]
  features: "1"
  metrics:
    mse: {class_path: torchmetrics.MeanSquaredError}
"""


class Net(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))


class Own(GAPMixin, LightningModule):
    """The code a user writes: the network and the loss, and the arguments to be set from outside."""

    def __init__(self, width: int = 5, gain_rate: float = 0.1) -> None:
        super().__init__(
            Net(width),
            F.mse_loss,
            GAP(linear=True),
            inner=InnerSettings(steps=2),
            preconditioner_learning_rate=gain_rate,
        )
        self.save_hyperparameters()


class Whole(GAPMixin, LightningModule):
    """Takes all from outside."""


def run_cli(kind: type, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> LightningCLI:
    path = folder / "config.yaml"
    path.write_text(TRAINER + text)
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", str(path)])
    return LightningCLI(kind, EpisodicDataModule, save_config_callback=None)


def test_yaml_of_ones_own_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cli = run_cli(Own, OWN, tmp_path, monkeypatch)
    model = cli.model
    assert model.network[0].out_features == 3
    assert model.parameter_groups()[1]["lr"] == 0.01
    assert not torch.equal(model.gains()["0"], Own(width=3).gains()["0"])  # it did train
    assert {"train/loss", "val/loss"} <= set(cli.trainer.callback_metrics)
    path = tmp_path / "model.ckpt"
    cli.trainer.save_checkpoint(path)
    torch.testing.assert_close(weights(Own.load_from_checkpoint(path)), weights(model))


def test_yaml_of_all_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = run_cli(Whole, WHOLE, tmp_path, monkeypatch).model
    assert isinstance(model.network, Net)
    assert model.inner_loop.loss is F.mse_loss
    assert model.inner_loop.preconditioner.linear
    assert (model.inner_loop.steps, model.evaluation_steps, model.features) == (2, 3, "1")
    assert model.step_weights == [0.5, 1.0]
    assert list(model.val_measures.metrics[0]) == ["val/mse"]
    assert len(model.inner_loop.rates) == 4


class Characters(GAPMixin, LightningModule):
    def __init__(self) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
        )
        metrics = {"accuracy": FewShotAccuracy(), "interval": FewShotAccuracyInterval()}
        super().__init__(
            use_batch_statistics(network), F.cross_entropy, inner=InnerSettings(steps=2, learning_rate=0.2),
            learning_rate=0.02, preconditioner_learning_rate=0.02, metrics=metrics,
        )  # fmt: skip


def images(count: int) -> list[Any]:
    """Tasks of three classes, each a pattern of its own in noise."""
    generator = torch.Generator().manual_seed(0)

    def samples(patterns: Tensor, number: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(3).repeat(number).expand(6, -1)
        x = patterns.gather(1, labels[..., None, None].expand(-1, -1, 4, 4))
        return (x + 0.5 * torch.randn(x.shape, generator=generator)).unsqueeze(2), labels

    batches = []
    for _ in range(count):
        patterns = torch.randn(6, 3, 4, 4, generator=generator)
        batches.append((samples(patterns, 1), samples(patterns, 5)))
    return batches


def test_learns_to_classify_from_one_shot_and_logs_accuracy_with_its_interval():
    model, batches = Characters(), images(16)
    held_out = Batches(batches[12:])
    settings = {"max_epochs": 3, "precision": "32-true", "log_every_n_steps": 1}
    trainer = fit(model, batches[:12], validation=held_out, **settings)
    logged = trainer.callback_metrics
    model.eval()
    outputs = torch.cat([model.adapt_and_measure(batch).outputs for batch in batches[12:]])
    targets = torch.cat([batch[1][1] for batch in batches[12:]])
    accuracies = (outputs.argmax(-1) == targets).double().mean(1)
    torch.testing.assert_close(logged["val/accuracy"], accuracies.mean(), check_dtype=False)
    half = 1.96 * accuracies.std() / len(accuracies) ** 0.5
    torch.testing.assert_close(logged["val/interval"], half, check_dtype=False)
    assert logged["val/accuracy"] - logged["val/interval"] > 1 / 3
    assert logged["gap/0/gain_min"] < logged["gap/0/gain_max"]  # in the beginning all are equal
    assert list(model.gains()) == ["0"]  # the linear head takes the plain gradient, as published


def test_every_loader_is_measured_for_itself():
    model, batches = Characters(), images(4)
    trainer = fit(model, batches[:2], max_epochs=1, precision="32-true")
    found = trainer.validate(model, [Batches(batches[2:3]), Batches(batches[3:])], verbose=False)
    model.eval()
    losses = [model.adapt_and_measure(batch).losses.detach().mean().item() for batch in batches[2:]]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    for number, (values, loss) in enumerate(zip(found, losses, strict=True)):
        assert values[f"val/loss/dataloader_idx_{number}"] == pytest.approx(loss, rel=1e-5)
