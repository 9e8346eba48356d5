"""Mistakes are named before a training loses time over them; and the callback as it is written in YAML."""

import inspect
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_plugins.callbacks import LowRankCompression, Penalty, SearchSettings, Timing
from lightning_plugins.schedules import Linear
from tests.callbacks.low_rank import nested
from tests.models import Batches, Classifier, fit, make_batches

BATCHES = make_batches(6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": []}, ValueError, "`layers` must be a module name"),
        ({"layers": "head:input"}, ValueError, "not its input or output"),
        ({"budget": 0}, ValueError, "`budget`, the share left, must be more than 0 and less than 1, got 0"),
        ({"budget": 60}, ValueError, "did you mean 0.6?"),
        ({"budget": "0.6"}, TypeError, "`budget` must be a number"),
        ({"weight": -0.1}, ValueError, "`weight` must be at least 0, got -0.1"),
        ({"penalty": -0.1}, ValueError, "`penalty`, a weight, must be at least 0, got -0.1"),
        ({"penalty": "much"}, TypeError, r"`penalty` must be a weight or a Penalty, got 'much' \(str\)"),
        ({"timing": 0.5}, TypeError, r"`timing` must be a Timing, such as Timing\(search_at=0.4, .*got 0.5"),
        ({"weight": math.inf}, ValueError, "`weight` must be finite"),
        ({"search": "bem"}, ValueError, "`search` must be .* did you mean 'beam'?"),
        ({"method": "bem"}, ValueError, "`method` must be .* did you mean 'beam'?"),
        ({"options": {"widht": 3}}, ValueError, "'beam' takes width, step, .*got 'widht'; did you mean 'width'"),
        ({"method": "energy", "options": {"width": 3}}, ValueError, "'energy' takes none, got 'width'"),
        ({"options": 4}, TypeError, "`options` must be a dict, got 4"),
        ({"score": 3}, TypeError, "`score` must be the name of a method, a function or None, got 3"),
        ({"batches": 0}, ValueError, "`batches` must be at least 1"),
        ({"ranks": {}}, TypeError, "`ranks` must be a dict of layer names and ranks, with one at least"),
        ({"ranks": 4}, TypeError, "`ranks` must be a dict"),
        ({"ranks": {"head": 0}}, ValueError, r"`ranks\['head'\]` must be at least 1, got 0"),
        ({"cost": "flop"}, ValueError, "did you mean 'flops'?"),
        ({"p": 3}, ValueError, "`p` must be 1 or 2"),
        ({"scheme": 3}, ValueError, "`scheme` must be 1 or 2"),
        ({"unit": "step"}, ValueError, "did you mean 'steps'?"),
        ({"search_at": 1.5}, ValueError, r"`search_at` must be in \[0, 1\], got 1.5.*with `unit='fraction'`"),
        ({"search_at": -1, "unit": "steps"}, ValueError, "`search_at` must be at least 0, got -1"),
        ({"search_at": 0.9}, ValueError, "`factorize_at` must not be before `search_at`, got search_at=0.9, fact"),
        ({"factorize_at": "0.5"}, TypeError, "`factorize_at` must be a number"),
        ({"every_n_steps": 0}, ValueError, "`every_n_steps` must be at least 1"),
        ({"figures": 1}, TypeError, "`figures` must be True or False, got 1"),
        ({"on_nonfinite": "skp"}, ValueError, "did you mean 'skip'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        LowRankCompression(**nested({"layers": "head", **arguments}))


class ByHand(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def lbfgs() -> Classifier:
    model = Classifier()
    model.configure_optimizers = lambda: torch.optim.LBFGS(model.parameters())
    return model


def normed() -> Classifier:
    model = Classifier()
    nn.utils.parametrizations.weight_norm(model.head)
    return model


def tied() -> Classifier:
    model = Classifier()
    model.extra = nn.Linear(5, 3)
    model.extra.weight = model.head.weight
    return model


def grouped() -> Classifier:
    model = Classifier()
    model.extra = nn.Conv2d(4, 4, 3, groups=4)
    return model


@pytest.mark.parametrize(
    ("model", "arguments", "trainer", "message"),
    [
        (Classifier, {"layers": "hed"}, {}, "did you mean 'head'"),
        (Classifier, {"layers": "backbone.1"}, {}, "'backbone.1' must be a layer .* it is a Tanh"),
        (grouped, {"layers": "extra"}, {}, "has 4 groups"),
        (normed, {"layers": "head"}, {}, "has a weight that is computed"),
        (tied, {"layers": "head"}, {}, r"shares a parameter with another module \(tied weights\)"),
        (Classifier, {"budget": 0.01}, {}, "`budget` must be at least 0.3"),
        (Classifier, {"ranks": {"hed": 2}}, {}, "did you mean 'head'"),
        (Classifier, {"ranks": {"head": 9}}, {}, r"`ranks\['head'\]` must be at most 3, got 9"),
        (Classifier, {"ranks": {"head": 2}}, {}, r"must make at least one layer smaller, as at most \{'head': 1\} do"),
        (
            Classifier,
            {"layers": "backbone.*", "ranks": {"head": 1}},
            {},
            r"that `layers=\['backbone.\*'\]` matches, got 'head'",
        ),
        (Classifier, {"cost": "flops"}, {}, "`example_input_array`, and Classifier has none.*`cost='params'`"),
        (
            Classifier,
            {"score": "acuracy"},
            {},
            "`search.score` must be the name of a method of Classifier, got 'acuracy'",
        ),
        (Classifier, {"score": "los"}, {}, "did you mean 'loss'?"),
        (ByHand, {}, {}, "`search.score` must be given with manual optimization.*ByHand returns no loss"),
        (Classifier, {"data": None}, {}, "`search.data` must be given where .* `DataLoader` .* got Batches"),
        (Classifier, {"data": "val"}, {}, "name of a method of Classifier or the datamodule.*got 'val'"),
        (Classifier, {"data": [], "search_at": 0}, {}, "`search.data` must have at least one batch, got none"),
        (lbfgs, {}, {}, "not possible for LBFGS; use SGD, AdamW"),
        (Classifier, {}, {"max_epochs": -1, "max_steps": -1}, "`max_epochs=-1` has no end; pass `unit='steps'`"),
        (Classifier, {}, {"others": [StochasticWeightAveraging(0.1)]}, "StochasticWeightAveraging averages parameters"),
    ],
)
def test_wrong_combinations_are_named(model, arguments, trainer, message):
    trainer = {"max_epochs": 1, **trainer}
    callback = LowRankCompression(**nested({"layers": "*", "budget": 0.7, "data": BATCHES[:2], **arguments}))
    with pytest.raises(Exception, match=message):
        fit(model(), BATCHES[:1], [callback, *trainer.pop("others", [])], **trainer)


class WithoutLoss(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


def test_a_training_step_without_a_loss_is_no_score():
    callback = LowRankCompression(**nested({"layers": "*", "budget": 0.7, "data": BATCHES[:2], "search_at": 0}))
    with pytest.raises(
        Exception, match=r"`search\.score` must be given where the training step returns no loss, got NoneType"
    ):
        fit(WithoutLoss(), BATCHES[:1], [callback], max_epochs=1)


class CanBeShardedAgain(Classifier):
    def configure_sharding(self) -> None:
        raise AssertionError


class Mesh(ModelParallelStrategy):
    """Has processes of a number of its own."""

    ranks = 1

    @property
    def device_mesh(self) -> Any:
        return {"tensor_parallel": SimpleNamespace(size=lambda: self.ranks)}


@pytest.mark.parametrize(
    ("model", "ranks", "message"),
    [
        (Classifier, 1, "move the calls of `fully_shard` from `configure_model` of Classifier to a method `configure_"),
        (CanBeShardedAgain, 2, "got `tensor_parallel_size=2`; pass `tensor_parallel_size=1`"),
    ],
)
def test_sharding_that_cannot_be_done_again_is_named(model, ranks, message, monkeypatch):
    callback, strategy = LowRankCompression("head", search="energy"), Mesh()
    strategy.ranks = ranks
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", callbacks=[callback])
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", strategy)
    with pytest.raises(MisconfigurationException, match=message):
        callback.setup(trainer, model(), "fit")


def test_a_module_of_the_other_package_is_refused():
    with pytest.raises(Exception, match="works with modules of `lightning"):
        LowRankCompression("head").setup(Trainer(logger=False, accelerator="cpu"), nn.Linear(2, 2), "fit")


YAML = """
seed_everything: 0
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 3
  precision: 64-true
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_plugins.callbacks.LowRankCompression
      init_args:
        layers: ["backbone.*", head]
        budget: 0.7
        penalty:
          weight: 0.1
          p: 1
          schedule:
            class_path: lightning_plugins.schedules.Linear
            init_args: {start: 0, end: 1, until: 8, unit: steps}
          every_n_steps: 2
          on_nonfinite: raise
        search:
          method: beam
          options: {width: 2, step: 1}
          score: score
          data: train_dataloader
          batches: 2
          calibration: false
        timing: {search_at: 4, factorize_at: 9, unit: steps}
        cost: params
        scheme: 1
        figures: false
"""
RANKS = {"backbone.0": 2, "head": 1}


class FromYaml(Classifier):
    def __init__(self, width: int = 5) -> None:
        super().__init__(width=width, lr=0.05)

    def train_dataloader(self) -> Batches:
        return Batches(BATCHES)

    def score(self, batch: Any) -> Any:
        return -self.loss(batch)


@pytest.mark.parametrize("ranks", [None, RANKS], ids=["search", "ranks"])
def test_yaml_trains_like_python(ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = yaml.safe_load(YAML)
    (entry,) = config["trainer"]["callbacks"]
    if ranks:
        entry["init_args"]["ranks"] = ranks
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", str(path)])
    cli = LightningCLI(FromYaml, save_config_callback=None)
    written = entry["init_args"]
    penalty = Penalty(**{**written["penalty"], "schedule": Linear(0, 1, until=8, unit="steps")})
    timing, search = Timing(**written["timing"]), SearchSettings(**written["search"])
    arguments = {**written, "penalty": penalty, "timing": timing, "search": search}
    torch.manual_seed(0)
    expected = FromYaml()
    fit(expected, BATCHES, [LowRankCompression(**arguments)], max_epochs=3)
    torch.testing.assert_close(dict(cli.model.state_dict()), dict(expected.state_dict()))
    assert cli.trainer.callbacks[0].finished
    assert {*written, "ranks", "ratio"} == set(inspect.signature(LowRankCompression).parameters)


def test_yaml_with_the_older_name_of_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = yaml.safe_load(YAML)
    (entry,) = config["trainer"]["callbacks"]
    del entry["init_args"]["budget"]
    entry["init_args"]["ratio"] = 0.3
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(path)])
    with pytest.warns(FutureWarning, match=r"`ratio` was renamed: pass `budget=0\.7`"):
        cli = LightningCLI(FromYaml, save_config_callback=None, run=False)
    assert cli.trainer.callbacks[0].budget == 0.7
