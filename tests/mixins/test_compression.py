"""Compression under a budget by hand, in a module with manual optimization."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_plugins.callbacks import HybridCompression, MaskScheduling, RankScheduling
from lightning_plugins.compression import ChoiceRates, Limits
from lightning_plugins.mixins import CompressionMixin
from lightning_plugins.schedules import Linear
from tests._processes import run_on_ranks
from tests.callbacks.budgets import BATCHES, BEGIN, END, Model, in_steps, params, seeded
from tests.models import fit


class ByHand(CompressionMixin, Model):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.chosen = {
            id(p) for p in self.attach_compression("*", budget=0.5, inputs=torch.zeros(2, 6).double(), **settings)
        }

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        self.compression_schedule(min(self.global_step / 12, 1.0))
        loss = self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.shares.append(float(self.compression_step()[0]))
        optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        self.shares: list[float] = []
        return torch.optim.AdamW([p for p in self.parameters() if id(p) not in self.chosen], lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize("settings", [{}, {"ranks": False}, {"masks": False}], ids=["both", "masks", "ranks"])
def test_by_hand(settings):
    model = seeded(ByHand, **settings)
    assert len(model.chosen) == (3 if "ranks" in settings else 4 if "masks" in settings else 7)
    fit(model, BATCHES, max_epochs=3)
    assert model.shares[-1] <= 0.5 + 1e-6
    masked = copy.deepcopy(model)
    choice = model.compress()
    assert params(model) == choice.cost <= 0.5 * 399
    assert not hasattr(model, "channel_masks")
    assert not hasattr(model, "rank_thresholds")
    x = BATCHES[0][0]
    assert model(x).shape == masked(x).shape
    with pytest.raises(RuntimeError, match="`attach_compression` must be called first"):
        model.compress()


def test_before_the_choice_the_training_is_the_bare_one():
    model, bare = seeded(Loose), seeded(Loose)
    chosen = {id(p) for p in model.attach_compression(budget=0.5, inputs=torch.zeros(2, 6).double())}
    trained(bare, 6, set())
    shares = trained(model, 6, chosen, lambda step: 0.0)
    assert shares == [1.0] * 6
    x = BATCHES[0][0]
    torch.testing.assert_close(model(x), bare(x), rtol=0, atol=0)
    for name, parameter in bare.named_parameters():
        torch.testing.assert_close(trained_parameter(model, name), parameter, rtol=0, atol=0)


def trained_parameter(model: nn.Module, name: str) -> Tensor:
    """A parameter, and not what masks and thresholds make of it."""
    owner, _, attribute = name.rpartition(".")
    steps = getattr(model.get_submodule(owner), "parametrizations", {})
    return steps[attribute].original if attribute in steps else model.get_parameter(name)


@pytest.mark.parametrize("settings", [{}, {"ranks": False}, {"masks": False}], ids=["both", "masks", "ranks"])
def test_a_loop_by_hand_takes_the_steps_of_the_callback(settings):
    kind = MaskScheduling if "ranks" in settings else RankScheduling if "masks" in settings else HybridCompression
    callback, dense = in_steps(kind, schedule=Linear(0.1, 1.0, begin=BEGIN, until=END, unit="steps")), seeded(Loose)
    with pytest.warns(UserWarning, match="ended before `end=11`"):
        fit(dense, BATCHES, [callback], max_steps=END - 1)
    wanted = callback.state_dict()["own"]["network"]

    model = seeded(Loose)
    rates = ChoiceRates(scores=0.2, thresholds=0.03)
    inputs = torch.zeros(2, 6).double()
    chosen = {id(p) for p in model.attach_compression(budget=0.5, inputs=inputs, rates=rates, **settings)}
    trained(model, END - 1, chosen, lambda step: 0.1 + 0.9 * (step - BEGIN) / (END - BEGIN) if step >= BEGIN else 0.0)
    for name, part in (("masks", "channel_masks"), ("thresholds", "rank_thresholds")):
        assert (wanted[name] is None) == (not hasattr(model, part))
        for key, value in (wanted[name] or {}).items():
            torch.testing.assert_close(model.get_submodule(part).state_dict()[key], value, rtol=1e-5, atol=1e-6)
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(trained_parameter(model, name), parameter, rtol=1e-5, atol=1e-6)


def trained(model: Any, steps: int, chosen: set[int], progress: Any = None) -> list[float]:
    """Train in a loop with the optimizer of the module; the shares of the cost."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if id(p) not in chosen], lr=0.05, momentum=0.9)
    shares = []
    for step in range(steps):
        if progress is not None:
            model.compression_schedule(progress(step))
        optimizer.zero_grad()
        model.loss(BATCHES[step % len(BATCHES)]).backward()
        if progress is not None:
            shares.append(float(model.compression_step()[0]))
        optimizer.step()
    return shares


def test_a_checkpoint_from_within_the_choice_is_gone_on_from():
    first, second = seeded(ByHand), seeded(ByHand)
    trained(first, 6, first.chosen, lambda step: (step + 1) / 12)
    second.load_state_dict(first.state_dict())
    for scores, own in zip(second.channel_masks.scores, first.channel_masks.scores, strict=True):
        torch.testing.assert_close(scores, own, rtol=0, atol=0)
    shares = trained(second, 3, second.chosen, lambda step: (step + 7) / 12)
    assert shares[-1] < shares[0] < 1
    assert second.compress().cost <= 0.5 * 399


def of_rank(rank: int, bounds: tuple[int, ...]) -> dict[str, Tensor]:
    """Train by hand under DDP with this rank's rows, for two steps as a whole; scores, thresholds and weights."""
    model = seeded(Loose)
    chosen = {id(p) for p in model.attach_compression(budget=0.5, inputs=torch.zeros(2, 6).double())}
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if id(p) not in chosen], lr=0.05, momentum=0.9)
    for step, (x, y) in enumerate(BATCHES):
        model.compression_schedule(max(step - 1, 0) / 6)
        optimizer.zero_grad()
        mine = slice(*bounds[rank : rank + 2])
        loss = nn.functional.cross_entropy(wrapped(x[mine]), y[mine], reduction="sum") / 8
        (loss * (len(bounds) - 1)).backward()  # DDP takes the mean over ranks
        model.compression_step()
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


@pytest.mark.distributed
def test_unequal_ranks_equal_one_process(tmp_path):
    (alone,) = run_on_ranks(of_rank, 1, tmp_path, (0, 8))
    for found in run_on_ranks(of_rank, 2, tmp_path, (0, 3, 8)):
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)
    start = seeded(Loose)
    start.attach_compression(budget=0.5, inputs=torch.zeros(2, 6).double())
    assert any((alone[key] != value).any() for key, value in start.state_dict().items() if "scores" in key)


def test_the_penalty_presses_the_cost_to_the_budget():
    model = seeded(Loose)
    optimizer = torch.optim.Adam(model.attach_compression(budget=0.5, inputs=torch.zeros(2, 6).double()), lr=0.1)
    network, _, _ = vars(model)["_compression"]
    for _ in range(40):
        optimizer.zero_grad()
        with pytest.warns(DeprecationWarning, match="call `compression_schedule"):
            penalty = model.compression_penalty(beta=1.0)
        penalty.backward()
        optimizer.step()
    assert float(network.share()[0]) < 0.55


class Loose(CompressionMixin, Model):
    """Nothing is attached by its constructor."""


class SelfLoading(CompressionMixin, Model):
    pass


def test_its_small_state_dict_is_loaded_by_a_fresh_module():
    model = seeded(ByHand)
    model.compress()
    fresh = seeded(SelfLoading)
    checkpoint = {"state_dict": model.state_dict()}
    fresh.on_load_checkpoint(checkpoint)
    fresh.load_state_dict(checkpoint["state_dict"])
    torch.testing.assert_close(fresh(BATCHES[0][0]), model(BATCHES[0][0]), rtol=0, atol=0)


def test_misuse_is_named():
    with pytest.raises(RuntimeError, match="`attach_compression` must be called first"):
        seeded(SelfLoading).compression_penalty(1.0)
    with pytest.raises(RuntimeError, match="has been called already"):
        seeded(ByHand).attach_compression(budget=0.5)
    with (
        pytest.raises(ValueError, match="`beta` must be positive"),
        pytest.warns(DeprecationWarning, match="compression_schedule"),
    ):
        seeded(ByHand).compression_penalty(0.0)
    with pytest.raises(ValueError, match="`progress`"):
        seeded(ByHand).compression_schedule(1.5)
    with pytest.raises(ValueError, match="`budget` must be at least"):
        seeded(SelfLoading).attach_compression(budget=0.01, inputs=torch.zeros(2, 6).double())

    class Plain(CompressionMixin):
        pass

    with pytest.raises(TypeError, match="mixed into a LightningModule, got Plain"):
        Plain().attach_compression(budget=0.5)
    assert isinstance(seeded(ByHand).backbone[0], nn.Linear)


class WithoutInput(CompressionMixin, Model):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = None


@pytest.mark.parametrize(
    ("kind", "settings", "error", "message"),
    [
        (Loose, {"budget": 40}, ValueError, "`budget`.* got 40; did you mean 0.4"),
        (Loose, {"budget": "half"}, TypeError, "`budget` must be a number, got 'half'"),
        (Loose, {"cost": "flop"}, ValueError, "did you mean 'flops'"),
        (Loose, {"layers": 3}, TypeError, "`layers` must be"),
        (Loose, {"layers": "backbon.*"}, ValueError, r"no module is called 'backbon\.\*'"),
        (Loose, {"limits": 3}, TypeError, "`limits` must be a Limits, got 3"),
        (Loose, {"limits": Limits(keep="haed")}, ValueError, "did you mean 'head'"),
        (Loose, {"rates": 0.1}, TypeError, "`rates` must be a ChoiceRates, got 0.1"),
        (Loose, {"masks": False, "ranks": False}, ValueError, "`masks` or `ranks` must be True"),
        (WithoutInput, {}, ValueError, "`inputs` must be given where the module has no `example_input_array`"),
        (WithoutInput, {"masks": False, "cost": "flops"}, ValueError, "`inputs` must be given"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(kind, settings, error, message):
    with pytest.raises(error, match=message):
        seeded(kind).attach_compression(**{"budget": 0.5, **settings})
    assert not any("compression" in name for name in vars(seeded(kind)))
