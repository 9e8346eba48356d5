"""Promises of every public callback, in one process; the table stands in `tests.contract_table`."""

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from tests.contract_by_hand import Model
from tests.contract_table import SETTINGS, Setting
from tests.models import Batches, fit, make_batches, without_hooks

BATCHES = make_batches(6)
CLIPPED = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2}
TRAINERS = {
    "plain": {},
    "accumulated and clipped by norm": CLIPPED,
    "clipped by value": {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
    "without epochs": {"max_epochs": -1, "max_steps": 9},
    "validated": {"validation": Batches(BATCHES[:2]), "num_sanity_val_steps": 2, "val_check_interval": 3},
}
every_setting = pytest.mark.parametrize("setting", [pytest.param(row, id=name) for name, row in SETTINGS.items()])


def assert_same(model: nn.Module, expected: nn.Module, **tolerance: float) -> None:
    weights = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    torch.testing.assert_close(weights, dict(expected.state_dict()), **tolerance)


def assert_different(model: nn.Module, other: nn.Module, *, least: float = 1e-3) -> None:
    differences = [(value - other.state_dict()[name]).abs().max() for name, value in model.state_dict().items()]
    assert max(differences) > least


@pytest.mark.parametrize("trainer", TRAINERS)
@every_setting
def test_trains_as_written_by_hand(setting: Setting, trainer: str):
    model, expected, plain = setting.make(), setting.reference(), setting.make()
    fit(model, BATCHES, setting.callbacks(), **TRAINERS[trainer])
    fit(expected, BATCHES, **TRAINERS[trainer])
    assert_same(model, expected, **setting.tolerance)
    fit(plain, BATCHES, **TRAINERS[trainer])
    if setting.by_hand is None:
        assert_same(model, plain, rtol=0, atol=0)
    else:
        assert_different(model, plain)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("trainer", ["plain", "accumulated and clipped by norm", "clipped by value"])
@every_setting
def test_half_precision(setting: Setting, trainer: str, precision: str):
    def half(model: Model, callbacks: Any = ()) -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12) if precision == "16-mixed" else None
        plugin = MixedPrecision(precision, "cpu", scaler)  # the Trainer itself would not use fp16 on a CPU
        fit(model, BATCHES, callbacks, plugins=plugin, precision=None, **TRAINERS[trainer])
        return scaler

    model, expected, plain = setting.make(), setting.reference(), setting.make()
    scaler = half(model, setting.callbacks())
    half(expected)
    half(plain)
    assert_same(model, expected, rtol=1e-3, atol=1e-3)  # a term that is scaled wrongly is off by more than a third
    if setting.by_hand is not None:
        assert_different(model, plain, least=0.01)
    if scaler is not None:
        assert scaler.get_scale() == 2.0**12  # no step was left out


@every_setting
def test_accumulated_equal_batches_are_one_big_batch(setting: Setting):
    if setting.remembers:
        return check_that_batches_see_each_other(setting)
    twice = [batch for batch in BATCHES for _ in range(2)]
    doubled = [tuple(torch.cat([part, part]) for part in batch) for batch in BATCHES]
    model, expected = setting.make(), setting.make()
    fit(model, twice, setting.callbacks(), accumulate_grad_batches=2)
    expected.loss = lambda batch: Model.loss(expected, batch) / 2  # its loss is a sum over the batch
    fit(expected, doubled, setting.callbacks())
    return assert_same(model, expected)


def check_that_batches_see_each_other(setting: Setting) -> None:
    """With a queue the second of two accumulated batches sees the first: not the same as one big batch."""
    forwards, backwards = setting.make(), setting.make()
    fit(forwards, BATCHES[:2], setting.callbacks(), accumulate_grad_batches=2, max_epochs=1)
    fit(backwards, BATCHES[1::-1], setting.callbacks(), accumulate_grad_batches=2, max_epochs=1)
    assert_different(forwards, backwards, least=1e-4)


def like_inductor(graph: Any, inputs: Any) -> Any:
    """A compiler that, like the default one, writes results into memory of its own; it needs no C++ compiler."""

    def run(*arguments: Any) -> list[Any]:
        results = graph(*arguments)
        return [torch.empty_like(x).copy_(x) if isinstance(x, torch.Tensor) else x for x in results]

    return make_boxed_func(run)


@pytest.mark.parametrize("backend", ["aot_eager", aot_autograd(fw_compiler=like_inductor)], ids=["eager", "inductor"])
@every_setting
def test_compiled(setting: Setting, backend: Any):
    model, expected = setting.make(), setting.reference()
    fit(torch.compile(model, backend=backend), BATCHES, setting.callbacks())
    fit(expected, BATCHES)
    assert_same(model, expected, **setting.tolerance)
    assert without_hooks(model)


@every_setting
def test_fits_twice(setting: Setting):
    callbacks, model, expected = setting.callbacks(), setting.make(), setting.reference()
    for _ in range(2):
        fit(model, BATCHES, callbacks)
        fit(expected, BATCHES)
    assert_same(model, expected, **setting.tolerance)
    other, expected = setting.make(width=4), setting.reference(width=4)
    fit(other, BATCHES, callbacks)
    fit(expected, BATCHES)
    assert_same(other, expected, **setting.tolerance)


@every_setting
def test_fast_dev_run(setting: Setting):
    model, expected = setting.make(), setting.reference()
    trainer = fit(model, BATCHES, setting.callbacks(), fast_dev_run=True, validation=Batches(BATCHES))
    fit(expected, BATCHES, fast_dev_run=True, validation=Batches(BATCHES))
    assert trainer.global_step == 1
    assert_same(model, expected, **setting.tolerance)


@every_setting
def test_logs_the_names_it_promises(setting: Setting):
    trainer = fit(setting.make(), BATCHES, setting.callbacks(), max_epochs=1, max_steps=1)
    assert set(trainer.callback_metrics) == set(setting.logged)
    assert all(bool(value.isfinite()) for value in trainer.callback_metrics.values())


class Fails(Model):
    def on_train_epoch_end(self) -> None:
        raise KeyError("the user's own error")


def anatomy(model: Model) -> dict[str, Any]:
    """All that a callback could leave behind: attributes, hooks, parametrizations and weights by name."""
    seen: dict[str, Any] = {"attributes": sorted(vars(model))}
    for name, module in model.named_modules():
        hooks = [len(value) for key, value in sorted(vars(module).items()) if key.endswith("_hooks")]
        seen[name] = (type(module), hooks, sorted(vars(module)) if name else None)
    seen["weights"] = list(model.state_dict())
    return seen


@pytest.mark.parametrize("kind", [Model, Fails], ids=["finished", "failed"])
@every_setting
def test_module_is_untouched_afterwards(setting: Setting, kind: type[Model]):
    model, plain = setting.make(kind), setting.make(kind)
    for trained, callbacks in ((plain, []), (model, setting.callbacks())):
        if kind is Fails:
            with pytest.raises(KeyError, match="the user's own error"):
                fit(trained, BATCHES, callbacks)
        else:
            fit(trained, BATCHES, callbacks)
    assert anatomy(model) == anatomy(plain)


def adamw(setting: Setting) -> Model:
    """In float64 from the start: Lightning restores weights before it converts them."""
    return setting.make(optimizer="adamw").double()


def checkpointed(folder: Any, setting: Setting, every: int) -> tuple[Model, list[Any]]:
    """Train with the callbacks; ``step=<number>.ckpt`` appear in the folder. The model, and the callbacks' states."""
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    model, callbacks = adamw(setting), setting.callbacks()
    fit(model, BATCHES, [*callbacks, saving], enable_checkpointing=True)
    return model, [callback.state_dict() for callback in callbacks]


@pytest.mark.parametrize("step", [4, 6, 9], ids=["first epoch", "between epochs", "second epoch"])
@every_setting
def test_resume_equals_uninterrupted(setting: Setting, step: int, tmp_path: Any):
    straight, states = checkpointed(tmp_path, setting, every=step)
    resumed, callbacks = adamw(setting), setting.callbacks()
    trainer = fit(resumed, BATCHES, callbacks, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert trainer.global_step == 12
    assert_same(resumed, straight, rtol=0, atol=0)
    torch.testing.assert_close([callback.state_dict() for callback in callbacks], states, rtol=0, atol=0)


@every_setting
def test_checkpoint_loads_without_the_plugin(setting: Setting, tmp_path: Any):
    straight, _ = checkpointed(tmp_path, setting, every=12)
    path = tmp_path / "step=12.ckpt"
    checkpoint = torch.load(path, weights_only=True)  # refuses all but tensors and primitives
    assert list(checkpoint["state_dict"]) == list(setting.make().state_dict())
    assert_same(Model.load_from_checkpoint(path, **setting.model), straight.float(), rtol=0, atol=0)
    goes_on = adamw(setting)
    trainer = fit(goes_on, BATCHES, ckpt_path=path, max_epochs=3)
    assert trainer.global_step == 18
    assert_different(goes_on.float(), straight)
