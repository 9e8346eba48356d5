"""Mistakes are named before a training loses time over them."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_plugins.callbacks import HybridCompression, LowRankCompression, MaskScheduling, RankScheduling
from lightning_plugins.schedules import Linear
from tests.callbacks.budgets import BATCHES, Model, in_steps, nested, seeded
from tests.models import fit


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        (HybridCompression, {"layers": []}, ValueError, "`layers` must be a module name"),
        (HybridCompression, {"layers": "head:input"}, ValueError, "not its input or output"),
        (HybridCompression, {"keep": 3}, TypeError, "`keep` must be"),
        (HybridCompression, {"budget": 0}, ValueError, "`budget`, .* must be more than 0 and less than 1, got 0"),
        (HybridCompression, {"budget": 40}, ValueError, "did you mean 0.4?"),
        (HybridCompression, {"budget": math.nan}, ValueError, "`budget` must be finite"),
        (HybridCompression, {"budget": "0.4"}, TypeError, "`budget` must be a number"),
        (HybridCompression, {"budget": True}, TypeError, r"`budget` must be a number, got True \(bool\)"),
        (HybridCompression, {"budget": 1.0}, ValueError, "must be more than 0 and less than 1, got 1.0"),
        (HybridCompression, {"cost": "flop"}, ValueError, "did you mean 'flops'?"),
        (HybridCompression, {"schedule": 0.5}, TypeError, "`schedule` must be a Schedule from 0 to 1"),
        (HybridCompression, {"unit": "step"}, ValueError, "did you mean 'steps'?"),
        (HybridCompression, {"begin": 1.5}, ValueError, r"`begin` must be in \[0, 1\], got 1.5"),
        (HybridCompression, {"begin": 0.8}, ValueError, "`end` must not be before `begin`"),
        (HybridCompression, {"unit": "epochs", "begin": -1}, ValueError, "`begin` must be at least 0, got -1"),
        (HybridCompression, {"begin": 0.5, "end": 0.5}, ValueError, "`end` must be after `begin`"),
        (HybridCompression, {"scores": 0.0}, ValueError, "`scores` must be above 0, got 0.0"),
        (MaskScheduling, {"scores": "fast"}, TypeError, "`scores` must be a number, got 'fast'"),
        (HybridCompression, {"beta_max": math.nan}, ValueError, "`beta_max` must be finite, got nan"),
        (RankScheduling, {"thresholds": -1.0}, ValueError, "`thresholds` must be above 0, got -1.0"),
        (HybridCompression, {"beta_max": 0.5}, ValueError, "`beta_max` must be at least 1"),
        (MaskScheduling, {"criterion": "magnitudes"}, ValueError, "did you mean 'magnitude'?"),
        (MaskScheduling, {"update_every": 0}, ValueError, "`update_every` must be at least 1"),
        (MaskScheduling, {"min_size": 0}, ValueError, "`min_size` must be at least 1"),
        (MaskScheduling, {"phase": None}, TypeError, r"`phase` must be a Phase, such as Phase\(begin=0.1.*got None"),
        (RankScheduling, {"limits": {"min_size": 2}}, TypeError, r"`limits` must be a Limits, got .* \(dict\)"),
        (HybridCompression, {"rates": 0.1}, TypeError, r"`rates` must be a ChoiceRates, got 0.1 \(float\)"),
        (MaskScheduling, {"thresholds": 0.1}, ValueError, "only `scores`, `beta_max`, `update_every` .*thresholds=0.1"),
        (MaskScheduling, {"refresh_every": 2}, ValueError, "`rates`: only .* have an effect here, got refresh_every=2"),
        (RankScheduling, {"scores": 0.1}, ValueError, "only `thresholds`, `beta_max`, `refresh_every` .*scores=0.1"),
        (
            HybridCompression,
            {"update_every": 2},
            ValueError,
            "`rates`: only .* have an effect here, got update_every=2",
        ),
        (RankScheduling, {"refresh_every": 0}, ValueError, "`refresh_every` must be at least 1"),
        (HybridCompression, {"multiple_of": 2.5}, TypeError, "`multiple_of` must be an int"),
        (HybridCompression, {"figures": 1}, TypeError, "`figures` must be True or False, got 1"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        kind(**nested({"layers": "*", **arguments}))


class Manual(Model):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Lbfgs(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class OfArray(Model):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = np.zeros((1, 6))


class WithoutInput(Model):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = None


@pytest.mark.parametrize(
    ("kind", "settings", "model", "trainer", "message"),
    [
        (
            HybridCompression,
            {},
            Manual,
            {},
            "manual optimization; subclass `lightning_plugins.mixins.CompressionMixin`",
        ),
        (MaskScheduling, {}, WithoutInput, {}, "`example_input_array`, and WithoutInput has none"),
        (RankScheduling, {"cost": "flops"}, WithoutInput, {}, "`cost='flops'` counts a forward pass"),
        (
            HybridCompression,
            {"unit": "fraction", "begin": 0.1, "end": 0.7},
            Model,
            {"max_epochs": -1},
            "`unit='fraction'` counts in fractions",
        ),
        (HybridCompression, {"schedule": Linear(0.0, 1.0)}, Model, {"max_epochs": -1}, "counts in fractions"),
        (
            HybridCompression,
            {},
            Model,
            {"callbacks": [StochasticWeightAveraging(0.1)]},
            "StochasticWeightAveraging .* use `WeightAveraging`",
        ),
        (RankScheduling, {}, Model, {"callbacks": [BackboneFinetuning()]}, "set `requires_grad` in your module"),
        (HybridCompression, {}, Lbfgs, {}, "not possible for LBFGS; use SGD, AdamW or another optimizer"),
        (HybridCompression, {}, Model, {"callbacks": [ModelPruning("l1_unstructured", amount=0.5)]}, "ModelPruning"),
        (HybridCompression, {}, Model, {"callbacks": [in_steps(MaskScheduling)]}, "would change the same weights"),
        (
            MaskScheduling,
            {},
            Model,
            {"callbacks": [LowRankCompression("*", budget=0.7, search="energy")]},
            "would change the same weights",
        ),
    ],
)
def test_wrong_combinations_are_named(kind, settings, model, trainer, message):
    callbacks = [in_steps(kind, **settings), *trainer.pop("callbacks", [])]
    with pytest.raises(MisconfigurationException, match=message):
        fit(seeded(model), BATCHES, callbacks, **trainer)


def test_sharded_parameters_are_refused():
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.__class__ = type("Sharded", (ModelParallelStrategy,), {})
    with pytest.raises(MisconfigurationException, match="sharded under Sharded; pass `strategy='ddp'`"):
        in_steps().setup(trainer, seeded(), "fit")


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (HybridCompression, {"budget": 0.01}, "`budget` must be at least 0.0.* for this network"),
        (HybridCompression, {"min_size": 12, "budget": 0.2}, "`budget` must be at least"),
        (HybridCompression, {"layers": "bakbone.0"}, "nearest: 'backbone'|did you mean|'bakbone.0'"),
        (HybridCompression, {"keep": "haed"}, "`keep`: no module is called 'haed'; did you mean 'head'"),
        (MaskScheduling, {"keep": "*"}, "'backbone.0': it is excluded by `layers` or `keep`"),
        (MaskScheduling, {"min_size": 100}, "that is left when all groups and ranks are at their minimum"),
        (RankScheduling, {"layers": "backbone.*", "keep": "backbone.*"}, "that `keep` does not name"),
        (MaskScheduling, {"layers": "head"}, "must match a layer that can lose channels"),
    ],
)
def test_what_cannot_be_had_is_named_before_training(kind, settings, message):
    model = seeded()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        fit(model, BATCHES, [in_steps(kind, **settings)])
    assert [name for name, _ in model.named_modules()] == names


def test_an_example_input_of_another_kind_is_named():
    with pytest.raises(TypeError, match=r"must be a tensor, a tuple .*, got ndarray"):
        fit(seeded(OfArray), BATCHES, [in_steps()])


def test_the_same_callback_twice_is_named():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `HybridCompression`"):
        fit(seeded(), BATCHES, [in_steps(), in_steps()])


def test_an_instance_is_told_apart_by_its_class_and_layers():
    same = ({}, {"budget": 0.4}, {"schedule": Linear(0.0, 1.0)}, {"figures": True}, {"scores": 1.0})
    assert len({in_steps(**settings).state_key for settings in same}) == 1
    others = {
        in_steps(kind, layers=layers).state_key for kind in (HybridCompression, MaskScheduling) for layers in "ab"
    }
    assert len(others) == 4
    state: dict[str, Any] = in_steps().state_dict()
    assert state["own"] is None
    assert torch.tensor(state["share"]) == 1
