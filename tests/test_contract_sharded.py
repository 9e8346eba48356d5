"""FSDP2: parameters sharded over the ranks train like those of one process; what is not supported says so."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_plugins.callbacks import VNERegularization
from lightning_plugins.distributed import full_tensor
from tests._processes import run_on_ranks
from tests.contract_by_hand import Model
from tests.contract_ranks import BOUNDS, act_as_rank
from tests.contract_table import SETTINGS, assert_close
from tests.models import fit, make_batches, shard

BATCHES = make_batches(6)


class Sharded(Model):
    """Has its layers only from `configure_model` on, as the strategy wants it."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.unmade: list[nn.Module] = [self.backbone.double(), self.head.double()]
        del self.backbone, self.head

    def configure_model(self) -> None:
        if not self.unmade:
            return
        self.backbone, self.head = self.unmade
        self.unmade = []
        for layer in (self.backbone[0], self.backbone[2], self.head):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def train_sharded(rank: int) -> dict[str, Any]:
    act_as_rank(rank, 2)
    mine, results = shard(as_double(BATCHES), BOUNDS[2]), {}
    for name, setting in SETTINGS.items():
        model = setting.make(Sharded)
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        if not setting.sharded:
            with pytest.raises(MisconfigurationException, match="ModelParallelStrategy"):
                fit(model, mine, setting.callbacks(), strategy=strategy, devices=2, precision="32-true")
            continue
        fit(model, mine, setting.callbacks(), strategy=strategy, devices=2, precision="32-true")
        sharded = type(model.head.weight.data).__name__ == "DTensor"
        results[name] = sharded, {key: full_tensor(value) for key, value in model.state_dict().items()}
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    with pytest.raises(MisconfigurationException) as refusal:
        fit(
            SETTINGS["vne"].make(Sharded),
            mine,
            SETTINGS["vne"].callbacks(),
            strategy=strategy,
            devices=2,
            precision="32-true",
        )
    return {**results, "refusal": str(refusal.value)}


def as_double(batches: Any) -> list[tuple[Tensor, Tensor]]:
    return [(x.double(), y) for x, y in batches]


@pytest.mark.distributed
def test_sharded_unequal_ranks_equal_one_process(tmp_path: Any):
    ranks = run_on_ranks(train_sharded, 2, tmp_path)
    for name, setting in SETTINGS.items():
        if not setting.sharded:
            continue
        expected = setting.reference()
        fit(expected, BATCHES)
        tolerance = setting.tolerance or {"rtol": 1e-6, "atol": 1e-6}
        for rank in ranks:
            sharded, weights = rank[name]
            assert sharded  # control: the strategy did split the parameters
            assert_close(name, weights, dict(expected.state_dict()), **tolerance)
    for rank in ranks:
        assert "`tensor_parallel_size=2`; pass `tensor_parallel_size=1`" in rank["refusal"]


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])  # the second one is a DDPStrategy, too
@pytest.mark.parametrize("name", SETTINGS)
def test_other_strategies_are_refused_where_parameters_matter(name: str, kind: type):
    # Made without its constructor: that wants an accelerator, and `setup` looks at nothing but the type.
    trainer: Any = SimpleNamespace(strategy=object.__new__(kind), global_step=0, is_global_zero=True, max_epochs=1)
    model, callback = SETTINGS[name].make(), SETTINGS[name].callbacks()[0]
    if SETTINGS[name].any_strategy:
        callback.setup(trainer, model, "fit")
        return
    with pytest.raises(MisconfigurationException, match=rf"got {kind.__name__}; pass `strategy='ddp'`"):
        callback.setup(trainer, model, "fit")


class MadeLate(Model):
    """Has its layers only from `configure_model` or the module's own `setup` on."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.unmade: list[nn.Module] = [self.backbone, self.head]
        del self.backbone, self.head

    def make_layers(self) -> None:
        if self.unmade:
            self.backbone, self.head = self.unmade
            self.unmade = []


class MadeInConfigureModel(MadeLate):
    def configure_model(self) -> None:
        self.make_layers()


class MadeInSetup(MadeLate):
    def setup(self, stage: str) -> None:
        self.make_layers()


@pytest.mark.parametrize("kind", [MadeInConfigureModel, MadeInSetup])
@pytest.mark.parametrize("name", SETTINGS)
def test_layers_that_are_made_late(name: str, kind: type[Model]):
    model, expected = SETTINGS[name].make(kind), SETTINGS[name].reference()
    for _ in range(2):  # the layers are there when the second training begins
        fit(model, BATCHES, SETTINGS[name].callbacks())
        fit(expected, BATCHES)
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), **SETTINGS[name].tolerance)


def test_unknown_layer_of_a_model_made_late_is_named():
    with pytest.raises(ValueError, match="did you mean 'backbone'"):
        fit(SETTINGS["vne"].make(MadeInConfigureModel), BATCHES, [VNERegularization("backbon", weight=0.3)])
