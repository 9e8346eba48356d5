"""Lightning's averages of weights follow `LowRankCompression`: they begin anew when the network becomes small."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_plugins.callbacks import LowRankCompression
from lightning_plugins.mixins import CompressionMixin
from tests._processes import run_on_ranks
from tests.callbacks.low_rank import BATCHES, RANKS, Model, assert_same, in_steps, seeded
from tests.callbacks.test_low_rank_compression_mistakes import CanBeShardedAgain, Mesh
from tests.contract_ranks import BOUNDS, act_as_rank
from tests.models import Batches, fit, shard

DECAY, SPLIT_AT, STEPS = 0.8, 12, 24


class Weights(Callback):
    """Keeps the network as every step leaves it, before an average is put in its place."""

    def __init__(self) -> None:
        self.found: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.found.append(copy.deepcopy(dict(pl_module.state_dict())))


def average() -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=DECAY)


def by_hand(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The first one, and the others with the rest of the weight, one after the other."""
    total = found[0]
    for one in found[1:]:
        total = {name: DECAY * total[name] + (1 - DECAY) * value for name, value in one.items()}
    return total


@pytest.mark.parametrize("first", ["compression", "average"])
def test_the_average_is_that_of_the_small_networks_steps(first):
    plain, watched = seeded().double(), Weights()
    fit(plain, BATCHES, [in_steps(ranks=RANKS), watched], max_epochs=4)
    model, callbacks = seeded().double(), [in_steps(ranks=RANKS), average()]
    fit(model, BATCHES, callbacks if first == "compression" else callbacks[::-1], max_epochs=4)
    assert type(model.backbone[0]) is nn.Sequential
    torch.testing.assert_close(dict(model.state_dict()), by_hand(watched.found[SPLIT_AT:]))


class Measures(Model):
    """Notes what validations see."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.seen: list[dict[str, Tensor]] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(copy.deepcopy(dict(self.state_dict())))


def test_validations_see_the_average_of_the_small_network():
    watched, model = Weights(), seeded(Measures).double()
    fit(
        model,
        BATCHES,
        [in_steps(ranks=RANKS), average(), watched],
        max_epochs=4,
        num_sanity_val_steps=0,
        validation=Batches(BATCHES[:1]),
    )
    assert len(model.seen) == 4
    torch.testing.assert_close(model.seen[2], by_hand(watched.found[SPLIT_AT : SPLIT_AT + 6]))
    torch.testing.assert_close(model.seen[3], by_hand(watched.found[SPLIT_AT:]))


class Saves(Callback):
    def __init__(self, at: int, path: Path) -> None:
        self.at, self.path = at, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)


class SelfLoading(CompressionMixin, Model):
    """Is small before its weights are loaded."""


@pytest.mark.parametrize("kind", [Model, SelfLoading])
@pytest.mark.parametrize("first", ["compression", "average"])
@pytest.mark.parametrize("at", [2, 8, 12, 15, 21])  # dense, with ranks, behind the last dense batch, small
def test_a_resumed_training_has_the_same_average(at, first, kind, tmp_path):
    def callbacks() -> list[Callback]:
        made = [in_steps(ranks=RANKS), average()]
        return made if first == "compression" else made[::-1]

    whole, resumed = seeded(kind).double(), seeded(kind).double()
    fit(whole, BATCHES, [*callbacks(), Saves(at, tmp_path / "a.ckpt")], max_epochs=4)
    fit(resumed, BATCHES, callbacks(), max_epochs=4, ckpt_path=tmp_path / "a.ckpt")
    assert_same(resumed, whole, rtol=0, atol=0)


def test_the_checkpoint_holds_the_average_and_loads_into_a_fresh_module(tmp_path):
    model = seeded().double()
    trainer = fit(model, BATCHES, [in_steps(ranks=RANKS), average(), Saves(STEPS, tmp_path / "a.ckpt")], max_epochs=4)
    assert trainer.global_step == STEPS
    state = torch.load(tmp_path / "a.ckpt", weights_only=False)["state_dict"]
    torch.testing.assert_close(state, dict(model.state_dict()))


def train(rank: int) -> dict[str, Tensor]:
    act_as_rank(rank, 2)
    model = seeded().double()
    fit(
        model,
        shard(BATCHES, BOUNDS[2]),
        [in_steps(ranks=RANKS, weight=0.0), average()],
        max_epochs=4,
        devices=2,
        strategy="ddp",
    )
    return dict(model.state_dict())


@pytest.mark.distributed
def test_two_processes_have_one_average(tmp_path):
    first, second = run_on_ranks(train, 2, tmp_path)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert "backbone.0.1.weight" in first


class Stops(Callback):
    """Ends training before the epoch with which the surgery was to come."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 11:
            trainer.should_stop = True


class Replaces(Callback):
    """Puts other weights in place when training ends."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.load_state_dict(self.weights)


@pytest.mark.parametrize("first", ["compression", "average"])
def test_a_split_that_no_training_follows_is_that_of_the_averaged_weights(first):
    model, watched, callbacks = seeded().double(), Weights(), [in_steps(ranks=RANKS), average()]
    callbacks = callbacks if first == "compression" else callbacks[::-1]
    fit(model, BATCHES, [*callbacks, watched, Stops()], max_epochs=4)
    by_itself = seeded().double()
    fit(by_itself, BATCHES, [Replaces(by_hand(watched.found)), in_steps(ranks=RANKS), Stops()], max_epochs=4)
    torch.testing.assert_close(dict(model.state_dict()), dict(by_itself.state_dict()))


def test_averages_of_sharded_weights_are_refused(monkeypatch):
    callback = LowRankCompression("head", search="energy")
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", callbacks=[callback, average()])
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", Mesh())
    with pytest.raises(MisconfigurationException, match="averages of weights do not work with ModelParallelStrategy"):
        callback.setup(trainer, CanBeShardedAgain(), "fit")
