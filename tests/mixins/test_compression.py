"""Compression under a budget by hand, in a module with manual optimization."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_plugins.mixins import CompressionMixin
from tests.callbacks.budgets import BATCHES, Model, params, seeded
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
        (Loose, {"keep": 3}, TypeError, "`keep` must be"),
        (Loose, {"keep": "haed"}, ValueError, "did you mean 'head'"),
        (Loose, {"min_channels": 0}, ValueError, "`min_channels` must be at least 1"),
        (Loose, {"multiple_of": 2.5}, TypeError, "`multiple_of` must be an int"),
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
