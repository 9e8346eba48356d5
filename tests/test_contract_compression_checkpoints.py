"""Checkpoints of compressions under a budget: plain before the surgery, of the small network thereafter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import nn

from lightning_plugins.compression import restore_structure
from lightning_plugins.mixins import CompressionMixin
from tests.callbacks.budgets import BATCHES, Model, params, seeded
from tests.callbacks.low_rank import assert_same
from tests.contract_compression import COMPRESSIONS, Row
from tests.models import Batches, fit

STEPS = 18  # of three epochs; the choice is made before step 11, and carried out behind step 12
PLAIN = {"warm-up": 2, "choice": 7, "frozen": 11}
SMALL = {"just made": 13, "fine-tuned": 15, "finished": STEPS}
# Said once at the surgery, where a best checkpoint is of the dense network.
pytestmark = pytest.mark.filterwarnings("ignore:.*compare with the small network only:UserWarning")
every_row = pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in COMPRESSIONS.items()])


class SelfLoading(CompressionMixin, Model):
    pass


def adamw(kind: Any = Model) -> Any:
    return seeded(kind, optimizer="adamw")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, nn.Module]]:
    """For every row the checkpoints of all steps, and the model in the end."""
    found = {}
    for name, row in COMPRESSIONS.items():
        folder, model = tmp_path_factory.mktemp("checkpoints"), adamw()
        saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        fit(model, BATCHES, [row.callback(), saving], enable_checkpointing=True, max_epochs=3)
        found[name] = folder, model
    return found


@pytest.mark.parametrize("phase", PLAIN)
@pytest.mark.parametrize("name", COMPRESSIONS)
def test_plain_before_the_surgery(name: str, phase: str, trained: Any):
    """They load without this package, into the module and a training of it; scores stand in the callback's part."""
    path = trained[name][0] / f"step={PLAIN[phase]}.ckpt"
    checkpoint = torch.load(path, weights_only=True)  # refuses all but tensors and primitives
    shapes = {key: value.shape for key, value in checkpoint["state_dict"].items()}
    assert shapes == {key: value.shape for key, value in adamw().state_dict().items()}
    (optimizer,) = checkpoint["optimizer_states"]
    assert [len(group["params"]) for group in optimizer["param_groups"]] == [len(list(adamw().parameters()))]
    assert_same(Model.load_from_checkpoint(path, optimizer="adamw").double(), restored(checkpoint), rtol=0, atol=0)
    model = adamw()
    trainer = fit(model, BATCHES, ckpt_path=path, max_epochs=3)
    assert trainer.global_step == STEPS
    assert params(model) == params(adamw())


def restored(checkpoint: dict[str, Any]) -> nn.Module:
    model: nn.Module = adamw()
    model.load_state_dict(checkpoint["state_dict"])
    return model


@pytest.mark.parametrize("phase", SMALL)
@pytest.mark.parametrize("name", COMPRESSIONS)
def test_small_after_it(name: str, phase: str, trained: Any):
    """By `restore_structure`, by `load_from_checkpoint`, and by fits with the callback and with the mixin alone."""
    folder, finished = trained[name]
    path = folder / f"step={SMALL[phase]}.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    fresh = restore_structure(adamw(), checkpoint)
    fresh.load_state_dict(checkpoint["state_dict"])
    assert params(fresh) == params(finished) < params(adamw())
    assert_same(SelfLoading.load_from_checkpoint(path, optimizer="adamw"), fresh, rtol=0, atol=0)
    for model, callbacks in ((adamw(), [COMPRESSIONS[name].callback()]), (adamw(SelfLoading), [])):
        fit(model, BATCHES, callbacks, ckpt_path=path, max_epochs=3)
        assert_same(model, finished, rtol=0, atol=0)


@every_row
def test_a_small_checkpoint_is_validated_with_the_callback(row: Row, trained: Any, request: pytest.FixtureRequest):
    folder, finished = trained[request.node.callspec.id]
    model = adamw()
    settings: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = Trainer(callbacks=[row.callback()], precision="64-true", **settings)
    trainer.validate(model, Batches(BATCHES), ckpt_path=folder / f"step={STEPS}.ckpt", verbose=False)
    assert_same(model, finished, rtol=0, atol=0)


class Scores(Callback):
    """Logs a validation loss as written down, so that the best epoch and the last good one are known."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            pl_module.log("wanted", self.losses[trainer.current_epoch])


@every_row
def test_the_best_and_the_last_checkpoint(row: Row, tmp_path: Path):
    """Stopped early behind the surgery; best is an epoch of fine-tuning."""
    model, callback = adamw(SelfLoading), row.callback()
    saving, last = ModelCheckpoint(tmp_path / "best", monitor="wanted"), ModelCheckpoint(tmp_path / "last")
    others = [saving, last, Scores([3.0, 2.0, 1.0, 4.0, 5.0, 0.0]), EarlyStopping("wanted", patience=2)]
    settings: dict[str, Any] = {"validation": Batches(BATCHES[:2]), "enable_checkpointing": True}
    trainer = fit(model, BATCHES, [callback, *others], max_epochs=6, **settings)
    assert trainer.current_epoch == 5
    assert_same(SelfLoading.load_from_checkpoint(last.best_model_path, optimizer="adamw"), model, rtol=0, atol=0)
    best = torch.load(saving.best_model_path, weights_only=True)
    assert best["global_step"] == STEPS
    trainer.validate(model, Batches(BATCHES), ckpt_path="best", verbose=False)
    torch.testing.assert_close(dict(model.state_dict()), dict(best["state_dict"]), rtol=0, atol=0)


@every_row
def test_stopped_within_the_choice(row: Row):
    """The module is the dense one, with a warning; stopped behind `end`, within the same epoch, it is the small one."""
    model, stopping = adamw(), EarlyStopping("wanted", patience=1)
    settings: dict[str, Any] = {"validation": Batches(BATCHES[:2])}
    with pytest.warns(UserWarning, match="nothing was removed"):
        fit(model, BATCHES, [row.callback(end=20), Scores([1.0, 2.0, 3.0, 4.0]), stopping], max_epochs=4, **settings)
    assert params(model) == params(adamw())
    model, stopping = adamw(), EarlyStopping("wanted", patience=1)
    fit(model, BATCHES, [row.callback(), Scores([1.0, 2.0, 3.0, 4.0]), stopping], max_epochs=4, **settings)
    assert params(model) <= row.budget * params(adamw())


@every_row
def test_the_best_checkpoint_is_of_the_small_network(row: Row, tmp_path: Path):
    """The best of all epochs lies before the surgery; from there on only small networks are compared."""
    model, callback = adamw(), row.callback()
    saving = ModelCheckpoint(tmp_path, monitor="wanted", save_top_k=1)
    settings: dict[str, Any] = {"validation": Batches(BATCHES[:2]), "enable_checkpointing": True}
    trainer = fit(model, BATCHES, [callback, saving, Scores([1.0, 2.0, 3.0, 4.0])], max_epochs=3, **settings)
    trainer.validate(model, Batches(BATCHES), ckpt_path="best", verbose=False)
    best = torch.load(saving.best_model_path, weights_only=True)
    assert params(restore_structure(adamw(), best)) == params(model) < params(adamw())
