"""Promises of every compression under a budget, in one process; the table is `tests.contract_compression`."""

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from functorch.compile import make_boxed_func
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from lightning_plugins.compression import restore_structure
from tests.callbacks.budgets import BATCHES, Model, params, seeded
from tests.callbacks.low_rank import assert_same
from tests.contract_compression import COMPRESSIONS, Row
from tests.models import Batches, fit

TRAINERS: dict[str, dict[str, Any]] = {
    "plain": {"max_epochs": 3},
    "accumulated and clipped by norm": {"max_epochs": 5, "accumulate_grad_batches": 2, "gradient_clip_val": 0.2},
    "clipped by value": {"max_epochs": 3, "gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
    "without epochs": {"max_epochs": -1, "max_steps": 14},
    "within an epoch": {"max_epochs": 1, "limit_train_batches": 6, "accumulate_grad_batches": 1},
    "validated": {"max_epochs": 3, "validation": Batches(BATCHES[:2]), "val_check_interval": 3},
}
SHORT = {"within an epoch": {"begin": 1, "end": 4}}
every_row = pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in COMPRESSIONS.items()])


@pytest.mark.parametrize("trainer", TRAINERS)
@every_row
def test_delivers_a_network_within_the_budget(row: Row, trainer: str):
    model, callback = seeded(), row.callback(**SHORT.get(trainer, {}))
    dense = params(model)
    fit(model, BATCHES, [callback], **TRAINERS[trainer])
    assert callback.finished
    assert params(model) <= row.budget * dense
    assert (callback.report.before.params, callback.report.after.params) == (dense, params(model))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@every_row
def test_half_precision(row: Row, precision: str):
    """Scores and thresholds have the gradients of a training in float32: squares show a scale that stays in."""

    def train(plugin: Any = None) -> tuple[nn.Module, dict[str, Any]]:
        model, callback = seeded().float(), row.callback()
        batches = [(x.float(), y) for x, y in BATCHES]
        settings: dict[str, Any] = {"precision": "32-true"} if plugin is None else {"plugins": plugin}
        with pytest.warns(UserWarning, match="nothing was removed"):
            fit(model, batches, [callback], **{"precision": None, **settings}, max_steps=7, gradient_clip_val=0.2)
        return model, callback.state_dict()["own"]

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12) if precision == "16-mixed" else None
    half, own = train(MixedPrecision(precision, "cpu", scaler))
    whole, wanted = train()
    assert_same(half, whole, rtol=0.05, atol=0.02)
    if row.learned:
        torch.testing.assert_close(own["optimizer"]["squares"], wanted["optimizer"]["squares"], rtol=0.2, atol=1e-5)
    if scaler is not None:
        assert scaler.get_scale() == 2.0**12  # no step was left out


@every_row
def test_accumulated_batches_are_one_big_batch(row: Row):
    models = [seeded(), seeded()]
    twice = [batch for batch in BATCHES for _ in range(2)]
    doubled = [tuple(torch.cat([part, part]) for part in batch) for batch in BATCHES]
    fit(models[0], twice, [row.callback()], max_epochs=3, accumulate_grad_batches=2)
    models[1].loss = lambda batch: Model.loss(models[1], batch) / 2  # its loss is a sum over the batch
    fit(models[1], doubled, [row.callback()], max_epochs=3)
    assert_same(*models, **row.tolerance)


def like_inductor(graph: Any, inputs: Any) -> Any:
    """A compiler that, like the default one, writes results into memory of its own; it needs no C++ compiler."""

    def run(*arguments: Any) -> list[Any]:
        results = graph(*arguments)
        return [torch.empty_like(x).copy_(x) if isinstance(x, torch.Tensor) else x for x in results]

    return make_boxed_func(run)


@pytest.mark.parametrize("backend", ["aot_eager", aot_autograd(fw_compiler=like_inductor)], ids=["eager", "inductor"])
@every_row
def test_compiled(row: Row, backend: Any):
    models, callbacks = [seeded(), seeded()], [row.callback(), row.callback()]
    compiled: Any = torch.compile(models[0], backend=backend)
    fit(compiled, BATCHES, callbacks[:1], max_epochs=3)
    fit(models[1], BATCHES, callbacks[1:], max_epochs=3)
    assert callbacks[0].report == callbacks[1].report
    assert_same(*models, **row.tolerance)


@every_row
def test_fits_twice(row: Row):
    model, callback = seeded(), row.callback()
    fit(model, BATCHES, [callback], max_epochs=3)
    report, before = callback.report, [parameter.detach().clone() for parameter in model.parameters()]
    fit(model, BATCHES, [callback], max_epochs=1)
    assert callback.report == report  # the small network is trained on
    assert not any(map(torch.equal, model.parameters(), before))
    other, expected = seeded(), seeded()
    fit(other, BATCHES, [callback], max_epochs=3)
    fit(expected, BATCHES, [row.callback()], max_epochs=3)
    assert_same(other, expected, rtol=0, atol=0)


@every_row
def test_fast_dev_run(row: Row, tmp_path: Path):
    """One batch is the whole training: fractions end with it, and the network is compressed. No file is written."""
    model, callback = seeded(), row.callback(unit="fraction", begin=0.1, end=0.7, figures=True)
    settings = {"fast_dev_run": True, "validation": Batches(BATCHES), "default_root_dir": tmp_path}
    trainer = fit(model, BATCHES, [callback], **settings)
    assert trainer.global_step == 1
    assert params(model) <= row.budget * callback.report.before.params
    assert not list(tmp_path.rglob("*.png"))


@every_row
def test_logs_the_names_it_promises(row: Row):
    callback = row.callback()
    trainer = fit(seeded(), BATCHES, [callback], max_epochs=3)
    assert set(trainer.callback_metrics) == set(row.logged)
    assert all(bool(value.isfinite()) for value in trainer.callback_metrics.values())
    assert float(trainer.progress_bar_metrics["budget/params"]) == pytest.approx(callback.report.share)


class Fails(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 8:
            raise KeyError("the user's own error")


def anatomy(model: nn.Module) -> dict[str, Any]:
    """All that a callback could leave behind: attributes, hooks, parametrizations, and tensors by name and shape."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = [len(value) for key, value in sorted(vars(module).items()) if key.endswith("_hooks")]
        seen[name] = (type(module), hooks, sorted(key for key in vars(module) if key not in ("lr", "form")))
    seen["tensors"] = {name: value.shape for name, value in model.state_dict().items()}
    return seen


@every_row
def test_nothing_is_left_on_a_module_that_was_not_compressed(row: Row):
    model, plain = seeded(), seeded()
    objects = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    with pytest.raises(KeyError, match="the user's own error"):
        fit(model, BATCHES, [row.callback(), Fails()], max_epochs=3)
    with pytest.raises(KeyError, match="the user's own error"):
        fit(plain, BATCHES, [Fails()], max_epochs=3)
    assert anatomy(model) == anatomy(plain)
    assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == objects


@every_row
def test_a_compressed_module_is_of_plain_layers(row: Row):
    """It is what a fresh module is with the structure of its state dict, and torch's own layers alone are in it."""
    model, plain = seeded(), seeded()
    fit(model, BATCHES, [row.callback()], max_epochs=3)
    fit(plain, BATCHES, max_epochs=3)
    expected = anatomy(restore_structure(plain, model.state_dict()))
    assert anatomy(model) == expected
    assert {type(module) for module in model.modules()} <= {Model, nn.Sequential, nn.Linear, nn.Tanh, nn.ReLU}


class MadeLate(Model):
    """Has its layers only from `configure_model` on."""

    def __init__(self) -> None:
        super().__init__()
        self.unmade: list[nn.Module] = [self.backbone, self.head]
        del self.backbone, self.head

    def configure_model(self) -> None:
        if self.unmade:
            self.backbone, self.head = self.unmade
            self.unmade = []


@every_row
def test_layers_that_are_made_late(row: Row):
    models: list[Any] = [seeded(MadeLate), seeded()]
    for model in models:
        fit(model, BATCHES, [row.callback()], max_epochs=3)
    assert_same(*models, rtol=0, atol=0)


class FromYaml(Model):
    """Brings its own batches."""

    def train_dataloader(self) -> Batches:
        return Batches(BATCHES)


TRAINER = """
seed_everything: 0
trainer: {accelerator: cpu, devices: 1, max_epochs: 3, precision: 64-true, logger: false, enable_checkpointing: false,
  enable_progress_bar: false, enable_model_summary: false}
"""


@every_row
def test_yaml_trains_like_python(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, callback = tmp_path / "config.yaml", tmp_path / "callback.yaml"
    path.write_text(TRAINER)
    callback.write_text(row.yaml)
    arguments = ["fit", "--config", str(path), "--trainer.callbacks+", str(callback)]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    cli = LightningCLI(FromYaml, save_config_callback=None)
    expected = seeded()
    fit(expected, BATCHES, [row.callback()], max_epochs=3)
    assert_same(cli.model, expected, rtol=0, atol=0)
    assert type(cli.trainer.callbacks[0]) is type(row.callback())


def test_the_table_writes_every_argument_in_yaml():
    written: dict[type, set[str]] = {}
    for row in COMPRESSIONS.values():
        entry = yaml.safe_load(row.yaml)
        assert entry["class_path"].rpartition(".")[2] == type(row.callback()).__name__
        written.setdefault(type(row.callback()), set()).update(entry["init_args"])
    for kind, names in written.items():
        assert names == set(inspect.signature(kind).parameters)
