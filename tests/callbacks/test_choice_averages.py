"""Lightning's averages of weights beside masks and thresholds: of the dense weights, then of the small network's."""

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import Tensor, nn

from lightning_plugins.callbacks import HybridCompression, MaskScheduling, RankScheduling
from lightning_plugins.compression.gates.masks import masks_of
from lightning_plugins.compression.gates.thresholds import thresholds_of
from lightning_plugins.mixins import CompressionMixin
from tests._killed import saving
from tests._processes import run_on_ranks
from tests.callbacks.budgets import BATCHES, Model, in_steps, seeded
from tests.callbacks.test_surgery_averages import Replaces, Stops, Weights, average, by_hand
from tests.contract_ranks import BOUNDS, act_as_rank
from tests.models import Batches, fit, shard

KINDS = [HybridCompression, MaskScheduling, RankScheduling]
SMALL_AT, STEPS = 12, 18


class Normed(CompressionMixin, Model):
    """With running statistics, which are averaged too; notes what a layer computes with in validations."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.backbone.insert(1, nn.BatchNorm1d(16))
        self.double()
        self.seen: list[dict[str, Any]] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        layer, masks, thresholds = self.backbone[0], masks_of(self), thresholds_of(self)
        mask = None if masks is None else masks.mask(0)
        tau = None if thresholds is None or thresholds.bypass else thresholds.tau(0)
        if isinstance(layer, nn.Linear):
            self.seen.append({"weight": layer.weight, "bias": layer.bias, "mask": mask, "tau": tau})


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def ordered(callbacks: list[Any], first: str) -> list[Any]:
    return callbacks if first == "compression" else callbacks[::-1]


def train(model: Any, callbacks: list[Any], **settings: Any) -> Trainer:
    """Three epochs of six steps: dense up to step 3, the choice up to step 12, then small."""
    settings = {"max_epochs": 3, "num_sanity_val_steps": 0, "validation": Batches(BATCHES[:1]), **settings}
    return fit(model, BATCHES, callbacks, **settings)


class Averaged(Callback):
    """Keeps the average after every step, before the surgery makes another."""

    def __init__(self, of: WeightAveraging) -> None:
        self.of, self.found = of, list[dict[str, Tensor]]()

    def on_train_batch_end(self, *_: Any) -> None:
        self.found.append(copy.deepcopy(dict(self.of._average_model.module.state_dict())))


@pytest.mark.parametrize("settings", [{}, {"use_buffers": False}], ids=["buffers", "parameters"])
@pytest.mark.parametrize("first", ["compression", "average"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_average_is_that_of_the_dense_and_then_of_the_small_networks_steps(kind, first, settings):
    model, ema, weights = seeded(Normed), EMAWeightAveraging(decay=0.8, **settings), Weights()
    averages = Averaged(ema)
    train(model, [*ordered([in_steps(kind), ema], first), weights, averages])
    assert [name for name in averages.found[11] if "parametriz" in name or "mask" in name] == []
    for steps in (slice(0, 7), slice(0, SMALL_AT), slice(SMALL_AT, STEPS)):
        expected, found = by_hand(weights.found[steps]), averages.found[steps.stop - 1]
        for name in [name for name, value in found.items() if value.is_floating_point()]:  # counts are truncated
            is_copied = "running" in name and settings
            wanted = (weights.found[steps.stop - 1] if is_copied else expected)[name]
            torch.testing.assert_close(found[name], wanted, msg=name, rtol=1e-9, atol=1e-12)
    assert_same(dict(model.state_dict()), averages.found[-1])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((kind, {}) for kind in KINDS),
        (MaskScheduling, {"criterion": "magnitude"}),
        (HybridCompression, {"refresh_every": 3}),
    ],
)
def test_training_is_the_same_without_an_average(kind, settings):
    with_one, without = Weights(), Weights()
    train(seeded(Normed), [in_steps(kind, **settings), average(), with_one], val_check_interval=2)
    train(seeded(Normed), [in_steps(kind, **settings), without], val_check_interval=2)
    assert_same(with_one.found, without.found)


def validated(callback: Any) -> tuple[list[dict[str, Any]], list[dict[str, Tensor]]]:
    """Return what validations after the steps 4, 6, 8, 10 and 12 saw, and the averages they were of."""
    model, ema = seeded(Normed), average()
    averages = Averaged(ema)
    train(model, [ema, callback, averages], val_check_interval=2)
    return model.seen[1:6], averages.found[3:12:2]


@pytest.mark.parametrize("criterion", ["learned", "magnitude"])
def test_validations_see_the_averaged_weights_under_the_present_masks(criterion):
    seen, averages = validated(in_steps(MaskScheduling, criterion=criterion, update_every=1))
    for one, dense in zip(seen, averages, strict=True):
        mask = one["mask"].detach()
        torch.testing.assert_close(one["weight"], mask[:, None] * dense["backbone.0.weight"], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(one["bias"], mask * dense["backbone.0.bias"], rtol=1e-9, atol=1e-12)
    assert float(mask.min()) == 0  # control: by the end some channels are closed


@pytest.mark.parametrize("refresh_every", [1, 3])
def test_validations_see_the_averaged_weights_under_the_present_thresholds(refresh_every):
    seen, averages = validated(in_steps(RankScheduling, refresh_every=refresh_every, thresholds=0.1))
    for one, dense in zip(seen, averages, strict=True):
        left, values, right = torch.linalg.svd(dense["backbone.0.weight"], full_matrices=False)
        expected = left @ torch.diag((values - one["tau"].detach()).clamp_min(0)) @ right
        torch.testing.assert_close(one["weight"], expected, rtol=1e-6, atol=1e-9)
    assert float(one["tau"]) > 0  # control


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", ["compression", "average"])
def test_a_resumed_training_has_the_same_average(kind, first, tmp_path):
    def callbacks() -> list[Callback]:
        return ordered([in_steps(kind), average()], first)

    whole = seeded(Normed)
    train(whole, [*callbacks(), saving(tmp_path)], enable_checkpointing=True)
    for step in (2, 4, 8, 11, 12, 13, 17):  # dense, choosing, decided, behind the last dense batch, small
        resumed = seeded(Normed)
        train(resumed, callbacks(), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))


@pytest.mark.parametrize("first", ["compression", "average"])
def test_checkpoints_of_averages_load(first, tmp_path):
    averages = Averaged(average())
    train(
        seeded(Normed),
        [*ordered([in_steps(), averages.of], first), averages, saving(tmp_path)],
        enable_checkpointing=True,
    )
    for step in (2, 8, 12, 15):
        loaded = Normed.load_from_checkpoint(tmp_path / f"step={step}.ckpt")
        assert_same(dict(loaded.state_dict()), averages.found[step - 1])
    assert loaded.backbone[0].out_features < 16 or isinstance(loaded.backbone[0], nn.Sequential)


@pytest.mark.parametrize("kind", KINDS)
def test_a_surgery_that_no_training_follows_is_that_of_the_averaged_weights(kind):
    found = {}
    for first in ("compression", "average"):
        model, averages = seeded(Normed), Averaged(average())
        train(model, [*ordered([in_steps(kind), averages.of], first), averages, Stops()], max_epochs=5)
        found[first] = dict(model.state_dict())
    assert_same(found["average"], found["compression"])
    by_itself = seeded(Normed)
    train(by_itself, [Replaces(averages.found[-1]), in_steps(kind), Stops()], max_epochs=5)
    torch.testing.assert_close(dict(by_itself.state_dict()), found["average"], rtol=1e-9, atol=1e-12)


def interrupted(first: str) -> tuple[Any, list[dict[str, Tensor]], list[Any]]:
    model, averages = seeded(Normed), Averaged(average())
    callbacks = ordered([in_steps(), averages.of], first)
    with pytest.warns(UserWarning, match="training ended before"):
        train(model, [*callbacks, averages], max_epochs=1)
    return model, averages.found, callbacks


@pytest.mark.parametrize("first", ["compression", "average"])
def test_a_training_that_ends_before_the_choice_leaves_the_averaged_dense_network(first):
    model, found, callbacks = interrupted(first)
    assert_same(dict(model.state_dict()), found[-1])
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in seeded(Normed).named_parameters()]
    ema = callbacks[first == "compression"]
    assert not {"_swap_models", "_copy_average_to_current"} & vars(ema).keys()
    assert "update_parameters" not in vars(ema._average_model)


def train_on_rank(rank: int) -> list[dict[str, Tensor]]:
    act_as_rank(rank, 2)
    averages = Averaged(average())
    settings: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
    fit(seeded(), shard(BATCHES, BOUNDS[2]), [in_steps(), averages.of, averages], max_epochs=3, **settings)
    return averages.found


@pytest.mark.distributed
def test_two_processes_have_one_average(tmp_path):
    first, second = run_on_ranks(train_on_rank, 2, tmp_path)
    assert_same(first, second)
