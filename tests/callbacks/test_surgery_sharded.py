"""`LowRankCompression` under FSDP2: whole tensors are split in every process, and their factors sharded again."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_plugins.callbacks._surgery.sharding import SavedStructure
from lightning_plugins.distributed import full_tensor
from lightning_plugins.mixins import CompressionMixin
from tests._killed import saving
from tests._processes import run_on_ranks
from tests.callbacks.budgets import BATCHES
from tests.callbacks.low_rank import RANKS, Model, in_steps, seeded
from tests.contract_ranks import BOUNDS, act_as_rank
from tests.models import Batches, fit, shard

GIVEN = {"ranks": RANKS}
SEARCHED: dict[str, Any] = {
    "beam": {"options": {"width": 2}},
    "outputs": {"method": "output_energy", "calibration": True, "cost": "flops"},
}


class Adaptive(Model):
    """With moments to carry over, and a weight decay for which parameters are sorted."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.example_input_array = BATCHES[0][0]
        self.double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) * self.trainer.world_size

    def configure_optimizers(self) -> Any:
        plain = [p for name, p in self.named_parameters() if name.endswith("bias")]
        decayed = [p for name, p in self.named_parameters() if name.endswith("weight")]
        groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed}]
        return torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1)


class Sharded(CompressionMixin, Adaptive):
    """Has its layers only from `configure_model` on, as the strategy wants it; each is sharded by itself."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.unmade: list[nn.Module] = [self.backbone, self.head]
        del self.backbone, self.head

    def configure_model(self) -> None:
        if self.unmade:
            self.backbone, self.head = self.unmade
            self.unmade = []
            self.configure_sharding()

    def configure_sharding(self) -> None:
        for layer in (self.backbone[0], self.backbone[2], self.head):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class InBlocks(Sharded):
    """The layers that are split belong to the group of a block, which stays in memory after the forward pass."""

    def configure_sharding(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.head, mesh=mesh)
        fully_shard(self.backbone, mesh=mesh, reshard_after_forward=False)


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: full_tensor(value).detach().clone() for name, value in tensors.items()}


def moments(trainer: Any) -> list[dict[str, Tensor]]:
    (optimizer,) = trainer.optimizers
    return [whole(optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]]


def outcome(kind: Any, batches: Any, callbacks: Any = (), how: Any = GIVEN, **settings: Any) -> dict[str, Any]:
    model, callback = seeded(kind), in_steps(**how)
    validation = Batches(BATCHES[:1])  # it leaves parameters gathered
    trainer = fit(model, batches, [callback, *callbacks], max_epochs=3, validation=validation, **settings)
    return {
        "weights": whole(dict(model.state_dict())),
        "moments": moments(trainer),
        "report": callback.report.to_json(),
        "kinds": sorted({type(p.data).__name__ for p in model.parameters()}),
    }


def sharded(**settings: Any) -> dict[str, Any]:
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return {"strategy": strategy, "devices": 2, "precision": "32-true", **settings}


def train(rank: int, kind: Any) -> dict[str, Any]:
    act_as_rank(rank, 2)
    return outcome(kind, shard(BATCHES, BOUNDS[2]), **sharded())


@pytest.mark.distributed
@pytest.mark.parametrize("kind", [Sharded, InBlocks])
def test_two_processes_equal_one(kind, tmp_path):
    expected = outcome(Adaptive, BATCHES)
    for found in run_on_ranks(train, 2, tmp_path, kind):
        assert found["kinds"] == ["DTensor"]  # control: the factors are sharded as well
        assert found["report"] == expected["report"]
        torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found["moments"], expected["moments"], rtol=1e-5, atol=1e-10)


class ShardsItself(Sharded):
    def configure_sharding(self) -> None:
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


def end(rank: int, folder: str) -> dict[str, Any]:
    """Split behind the last step; validate from that checkpoint; and refuse what cannot be done."""
    act_as_rank(rank, 2)
    batches, path = shard(BATCHES, BOUNDS[2]), Path(folder) / "small.ckpt"
    split = {"how": {"ranks": RANKS, "factorize_at": 18}}
    found = {"split": outcome(InBlocks, batches, [SavesAtEnd(path)], **split, **sharded())}
    model = seeded(InBlocks)
    settings: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(callbacks=[in_steps(ranks=RANKS)], **sharded(**settings))
    trainer.validate(model, Batches(BATCHES[:1]), ckpt_path=path, verbose=False)
    found["validated"] = {
        "weights": whole(dict(model.state_dict())),
        "left": "load_checkpoint" in vars(trainer.strategy),
    }
    with pytest.raises(
        MisconfigurationException, match="call `fully_shard` in `configure_sharding` on modules of Shard"
    ):
        outcome(ShardsItself, batches, **sharded())
    return found


class SavesAtEnd(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.distributed
def test_a_split_at_the_end_and_a_validation_of_the_small_network(tmp_path):
    expected = outcome(Adaptive, BATCHES, how={"ranks": RANKS, "factorize_at": 18})
    for found in run_on_ranks(end, 2, tmp_path, str(tmp_path)):
        torch.testing.assert_close(found["split"]["weights"], expected["weights"], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found["split"]["moments"], expected["moments"], rtol=1e-5, atol=1e-10)
        torch.testing.assert_close(found["validated"]["weights"], found["split"]["weights"], rtol=0, atol=0)
        assert not found["validated"]["left"]


def search(rank: int) -> dict[str, Any]:
    act_as_rank(rank, 2)
    batches = shard(BATCHES, BOUNDS[2])
    data = {"data": BATCHES[:2]}
    return {name: outcome(InBlocks, batches, how={**how, **data}, **sharded()) for name, how in SEARCHED.items()}


@pytest.mark.distributed
def test_searches_look_at_the_whole_network(tmp_path):
    first, second = run_on_ranks(search, 2, tmp_path)
    for name, how in SEARCHED.items():
        expected = outcome(Adaptive, BATCHES, how={**how, "data": BATCHES[:2]})
        assert first[name]["report"] == second[name]["report"] == expected["report"]
        torch.testing.assert_close(first[name]["weights"], expected["weights"], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(first[name]["moments"], expected["moments"], rtol=1e-5, atol=1e-10)


def resume(rank: int, folder: str, distributed: bool) -> dict[str, Any]:
    """Train straight on, then go on from the checkpoints of several steps."""
    act_as_rank(rank, 2)

    def run(callbacks: Any = (), **settings: Any) -> dict[str, Any]:
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=distributed)
        return outcome(InBlocks, shard(BATCHES, BOUNDS[2]), callbacks, **sharded(strategy=strategy, **settings))

    found = {0: run([saving(folder)], enable_checkpointing=True)}
    for step in (2, 8, 12, 15):  # dense, with ranks, behind the last dense batch, small
        found[step] = run(ckpt_path=Path(folder) / f"step={step}.ckpt")
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("distributed", [True, False], ids=["shards", "whole"])
def test_a_resumed_training_equals_an_uninterrupted_one(distributed, tmp_path):
    for found in run_on_ranks(resume, 2, tmp_path, str(tmp_path), distributed):
        for step in (2, 8, 12, 15):
            assert found[step]["report"] == found[0]["report"]
            for part in ("weights", "moments"):
                torch.testing.assert_close(found[step][part], found[0][part], rtol=0, atol=0, msg=f"{part}, {step}")


def test_strategies_of_older_versions_are_called_as_they_are():
    strategy = SimpleNamespace(load_checkpoint=lambda checkpoint_path: {"path": checkpoint_path}, broadcast=str)
    trainer: Any = SimpleNamespace(strategy=strategy, optimizers=[])
    SavedStructure("LowRankCompression", trainer, Model(), lambda: None)
    assert strategy.load_checkpoint("last.ckpt") == {"path": "last.ckpt"}
