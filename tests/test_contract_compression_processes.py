"""Promises of every compression under a budget over several processes; see `tests.contract_compression`."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from tests._processes import run_on_ranks
from tests.callbacks.budgets import BATCHES, Model, seeded
from tests.contract_compression import COMPRESSIONS
from tests.contract_ranks import BOUNDS, act_as_rank
from tests.contract_table import assert_close
from tests.models import fit, shard


class Summed(Model):
    """Its loss adds up over ranks, although DDP averages gradients."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch) * self.trainer.world_size


class PartlyUsed(Summed):
    """Has a layer that no step uses, which DDP has to look for."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.unused = nn.Linear(6, 2).double()


# name: (model, settings of the Trainer on one process and on several, the strategy of several)
CASES: dict[str, tuple[type[Model], dict[str, Any], Callable[[], Any]]] = {
    "plain": (Summed, {}, lambda: "ddp"),
    "accumulated and clipped": (
        Summed,
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2, "max_epochs": 5},
        lambda: "ddp",
    ),
    "a static graph": (Summed, {}, lambda: DDPStrategy(static_graph=True)),
    "looking for unused parameters": (PartlyUsed, {}, lambda: "ddp_find_unused_parameters_true"),
    "views of buckets": (Summed, {}, lambda: DDPStrategy(gradient_as_bucket_view=True)),
}


def outcome(row: str, kind: type[Model], batches: Any, **settings: Any) -> dict[str, Any]:
    model, callback = seeded(kind), COMPRESSIONS[row].callback()
    trainer = fit(model, batches, [callback], **{"max_epochs": 3, **settings})
    logged = {name: value.double() for name, value in trainer.callback_metrics.items()}
    return {"weights": dict(model.state_dict()), "logged": logged, "report": callback.report.to_json()}


def train(rank: int, world_size: int) -> dict[tuple[str, str], dict[str, Any]]:
    act_as_rank(rank, world_size)
    mine, found = shard(BATCHES, BOUNDS[world_size]), {}
    for row in COMPRESSIONS:
        for case, (kind, shared, strategy) in CASES.items():
            if case == "plain" or world_size == 2:
                found[row, case] = outcome(row, kind, mine, devices=world_size, strategy=strategy(), **shared)
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
def test_unequal_ranks_equal_one_process(world_size: int, tmp_path: Any):
    ranks = run_on_ranks(train, world_size, tmp_path, world_size)
    for row, case in ranks[0]:
        kind, shared, _ = CASES[case]
        name, expected = f"{row}, {case}", outcome(row, kind, BATCHES, **shared)
        for rank in ranks:
            found = rank[row, case]
            assert found["report"] == expected["report"], name
            for part in ("weights", "logged"):
                assert_close(name, found[part], expected[part], **COMPRESSIONS[row].tolerance)
            assert_close(name, found["weights"], ranks[0][row, case]["weights"], rtol=0, atol=0)


class Sharded(Model):
    """Has its layers only from `configure_model` on, as the strategy wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.unmade: list[nn.Module] = [self.backbone, self.head]
        del self.backbone, self.head

    def configure_model(self) -> None:
        if self.unmade:
            self.backbone, self.head = self.unmade
            self.unmade = []
            for layer in (self.backbone[0], self.backbone[2], self.head):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def refusals(rank: int) -> dict[str, str]:
    act_as_rank(rank, 2)
    found = {}
    for name, row in COMPRESSIONS.items():
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        settings: dict[str, Any] = {"strategy": strategy, "devices": 2, "precision": "32-true"}
        with pytest.raises(MisconfigurationException) as refusal:
            fit(seeded(Sharded), shard(BATCHES, BOUNDS[2]), [row.callback()], **settings)
        found[name] = str(refusal.value)
    return found


@pytest.mark.distributed
def test_sharded_parameters_are_refused_before_anything_is_changed(tmp_path: Any):
    for rank in run_on_ranks(refusals, 2, tmp_path):
        assert list(rank) == list(COMPRESSIONS)
        for message in rank.values():
            assert "sharded under ModelParallelStrategy; pass `strategy='ddp'` or `devices=1`, or compress" in message


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
@pytest.mark.parametrize("row", COMPRESSIONS)
def test_other_strategies_are_refused(row: str, kind: type):
    # Made without its constructor: that wants an accelerator, and `setup` looks at nothing but the type.
    trainer: Any = SimpleNamespace(strategy=object.__new__(kind), global_step=0)
    with pytest.raises(MisconfigurationException, match=rf"{kind.__name__}.*pass `strategy='ddp'`"):
        COMPRESSIONS[row].callback().setup(trainer, seeded(), "fit")
