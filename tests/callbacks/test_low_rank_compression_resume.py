"""A compression that was killed goes on as if nothing had happened, and its checkpoints load where one wants them."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_plugins.callbacks import LowRankCompression, Penalty, SearchSettings, Timing
from lightning_plugins.compression import restore_structure
from lightning_plugins.mixins import CompressionMixin
from tests._killed import Killed, fork_ranks, fork_to_be_killed, run_in_nursery, saving
from tests.contract_ranks import BOUNDS, act_as_rank
from tests.models import Batches, Classifier, fit, make_batches, shard

BATCHES = [(x.double(), y) for x, y in make_batches(6)]
SEARCH_AT, SPLIT_AT, STEPS = 4, 12, 18
PHASES = {"dense": 2, "before the search": 4, "regularised": 8, "fine-tuned": 15}


class Model(Classifier):
    """An optimizer with groups in another order than the parameters, and a schedule; float64 from the start."""

    def __init__(self) -> None:
        super().__init__(lr=0.02)
        self.double()  # Lightning restores weights before it converts them

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) * self.trainer.world_size

    def configure_optimizers(self) -> Any:
        plain = [p for p in self.parameters() if p.ndim < 2]
        decayed = [p for p in self.parameters() if p.ndim > 1]
        groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def score(self, batch: Any) -> Tensor:
        return -self.loss(batch)


class SelfLoading(CompressionMixin, Model):
    pass


class DiesInSearch(Model):
    scored = 0

    def score(self, batch: Any) -> Tensor:
        self.scored += 1
        if self.scored == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(batch)


def seeded(kind: type[Model] = Model) -> Model:
    torch.manual_seed(0)
    return kind()


def compression(factorize_at: int = SPLIT_AT - 3) -> LowRankCompression:
    return LowRankCompression(
        "*",
        budget=0.7,
        search=SearchSettings(score="score", data=BATCHES[:2], options={"step": 1, "width": 2}),
        penalty=Penalty(weight=0.1, every_n_steps=2),  # an odd step is no beginning
        timing=Timing(search_at=SEARCH_AT, factorize_at=factorize_at, unit="steps"),
        figures=False,
    )


def assert_same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def assert_same_state(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["report"] == wanted["report"]  # text
    assert_same({**found, "report": None}, {**wanted, "report": None})


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The checkpoints of all steps of one training, its weights, and the callback's state."""
    folder, model, callback = tmp_path_factory.mktemp("straight"), seeded(), compression()
    fit(model, BATCHES, [callback, saving(folder)], enable_checkpointing=True, max_epochs=3)
    return folder, dict(model.state_dict()), callback.state_dict()


@pytest.mark.parametrize("step", range(1, STEPS))
def test_resume_at_any_step_equals_uninterrupted(step, straight):
    folder, weights, state = straight
    assert torch.load(folder / f"step={step}.ckpt", weights_only=True)["global_step"] == step
    model, callback = seeded(), compression()
    trainer = fit(model, BATCHES, [callback], ckpt_path=folder / f"step={step}.ckpt", max_epochs=3)
    assert trainer.global_step == STEPS
    assert_same(dict(model.state_dict()), weights)
    assert_same_state(callback.state_dict(), state)


@pytest.mark.parametrize("step", [SPLIT_AT, STEPS - 1, STEPS])
def test_resume_with_the_split_at_the_end(step, tmp_path):
    model, resumed = seeded(), seeded()
    callbacks = [compression(factorize_at=15), saving(tmp_path)]
    fit(model, BATCHES, callbacks, enable_checkpointing=True, max_epochs=3)
    fit(resumed, BATCHES, [compression(factorize_at=15)], ckpt_path=tmp_path / f"step={step}.ckpt", max_epochs=3)
    assert_same(dict(resumed.state_dict()), dict(model.state_dict()))
    assert type(resumed.backbone[0]) is nn.Sequential


def test_resume_without_the_callback(straight):
    folder, weights, _ = straight
    model = seeded(SelfLoading)
    fit(model, BATCHES, ckpt_path=folder / "step=15.ckpt", max_epochs=3)
    assert_same(dict(model.state_dict()), weights)


def test_the_same_module_may_resume(straight):
    folder, weights, _ = straight
    model, callback = seeded(), compression()
    for step in (8, 15):  # the second time the module is small already
        fit(model, BATCHES, [callback], ckpt_path=folder / f"step={step}.ckpt", max_epochs=3)
        assert_same(dict(model.state_dict()), weights)


def test_load_from_checkpoint(straight):
    folder, _, _ = straight
    path = folder / "step=18.ckpt"
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert_same(dict(SelfLoading.load_from_checkpoint(path).state_dict()), saved)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .backbone.0.weight"):
        Model.load_from_checkpoint(path)
    model = restore_structure(Model(), torch.load(path, weights_only=True))
    model.load_state_dict(saved)
    assert_same(dict(model.state_dict()), saved)
    dense = torch.load(folder / "step=2.ckpt", weights_only=True)["state_dict"]
    assert_same(dict(SelfLoading.load_from_checkpoint(folder / "step=2.ckpt").state_dict()), dense)


@pytest.mark.parametrize(("kind", "callbacks"), [(Model, [compression]), (SelfLoading, [])], ids=["callback", "mixin"])
@pytest.mark.parametrize("step", [2, 15])
def test_validate_and_test_a_checkpoint(step, kind, callbacks, straight):
    folder, _, _ = straight
    trainer = Trainer(
        logger=False, enable_progress_bar=False, accelerator="cpu", callbacks=[make() for make in callbacks]
    )
    model = seeded(kind)
    model.test_step = model.validation_step
    wanted = SelfLoading.load_from_checkpoint(folder / f"step={step}.ckpt")
    losses = torch.stack([wanted.loss(batch) for batch in BATCHES[:2]]).detach()
    for run in (trainer.validate, trainer.test):
        (found,) = run(model, Batches(BATCHES[:2]), ckpt_path=folder / f"step={step}.ckpt", verbose=False)
        assert found["val_loss"] == pytest.approx(losses.mean().item())
        assert not model._load_state_dict_pre_hooks


def test_a_dense_checkpoint_does_not_fit_into_the_small_network(straight):
    folder, _, _ = straight
    small = SelfLoading.load_from_checkpoint(folder / "step=18.ckpt")
    with pytest.raises((RuntimeError, ValueError), match=r"backbone\.0"):
        fit(small, BATCHES, [compression()], ckpt_path=folder / "step=2.ckpt")


class Configured(CompressionMixin, LightningModule):
    """Has a hook of its own behind the mixin's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 6))
        self.seen: list[str] = []

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.seen = [name for name, _ in self.named_parameters()]


def test_the_mixin_and_a_hook_of_the_module():
    model = Configured()
    names = ["net.0.0.weight", "net.0.1.weight", "net.0.1.bias"]
    shapes = [(2, 8), (6, 2), (6,)]
    model.on_load_checkpoint({"state_dict": {n: torch.zeros(s) for n, s in zip(names, shapes, strict=True)}})
    assert model.seen == names


def test_the_mixin_belongs_into_a_module():
    with pytest.raises(TypeError, match="must be mixed into a LightningModule, got CompressionMixin"):
        CompressionMixin().on_load_checkpoint({"state_dict": {}})


JOBS = [  # each step's checkpoint is tried above, by one process
    *((name, 1) for name in ("dense", "within the search", "regularised", "fine-tuned")),
    *((name, 2) for name in ("before the search", "regularised", "fine-tuned")),
]


def train(rank: int, folder: Path, phase: str, ranks: int, what: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"max_epochs": 3}
    batches: Any = BATCHES
    if ranks > 1:
        act_as_rank(rank, ranks)
        batches = shard(BATCHES, BOUNDS[ranks])
        settings.update(strategy="ddp", devices=ranks)
    callbacks: list[Callback] = [compression()]
    model = seeded(DiesInSearch if (phase, what) == ("within the search", "killed") else Model)
    if what == "killed":
        callbacks += [saving(folder), Killed(PHASES.get(phase, STEPS))]
        settings["enable_checkpointing"] = True
    if what == "resumed":
        last = max(folder.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
        assert int(last.stem.partition("=")[2]) == PHASES.get(phase, SEARCH_AT)
        settings["ckpt_path"] = last
    fit(model, batches, callbacks, **settings)
    return {"weights": dict(model.state_dict()), "state": callbacks[0].state_dict()}


def nursery(folder: Path) -> None:
    for ranks in (1, 2):
        own = folder / f"straight-{ranks}"
        own.mkdir()
        fork_ranks(ranks, own, "straight", train, own, "", ranks, "straight")
    for phase, ranks in JOBS:
        own = folder / f"{phase}-{ranks}"
        own.mkdir()
        fork_to_be_killed(ranks, own, train, own, phase, ranks, "killed")
        fork_ranks(ranks, own, "resumed", train, own, phase, ranks, "resumed")


@pytest.mark.distributed
def test_resume_after_sigkill_equals_uninterrupted(tmp_path):
    run_in_nursery(nursery, tmp_path)
    straight = {ranks: torch.load(tmp_path / f"straight-{ranks}" / "straight-0.pt") for ranks in (1, 2)}
    for phase, ranks in JOBS:
        for rank in range(ranks):
            resumed = torch.load(tmp_path / f"{phase}-{ranks}" / f"resumed-{rank}.pt")
            assert_same(resumed["weights"], straight[ranks]["weights"])
            assert_same_state(resumed["state"], straight[ranks]["state"])
    one, two = (straight[ranks] for ranks in (1, 2))
    torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-6, atol=1e-6)  # the ranks' batches are unequal
    assert two["state"]["found"] == one["state"]["found"]
