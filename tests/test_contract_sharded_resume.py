"""FSDP2: a training goes on from a distributed checkpoint as if nothing had happened, also on one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_plugins.compression import factorize
from lightning_plugins.distributed import full_tensor
from tests._killed import fork_ranks, run_in_nursery, saving
from tests._processes import run_on_ranks
from tests.contract_ranks import BOUNDS, act_as_rank
from tests.contract_table import SETTINGS, assert_close
from tests.models import fit, shard
from tests.test_contract_sharded import BATCHES, Sharded, as_double

NAMES = [name for name, setting in SETTINGS.items() if setting.sharded]
SAVED = 8  # steps, of six in each of two epochs


def train(rank: int, ranks: int, name: str, folder: Path, resumes: bool) -> dict[str, Any]:
    """Return the state after training; one that does not resume leaves a checkpoint behind."""
    act_as_rank(rank, ranks)
    if ranks == 1:  # the strategy wants a group all the same
        dist.init_process_group("gloo", init_method=f"file://{folder}/init-of-one", rank=0, world_size=1)
    setting, batches, extra = SETTINGS[name], as_double(BATCHES), list[Callback]()
    settings: dict[str, Any] = {"ckpt_path": folder / f"step={SAVED}.ckpt"}
    if not resumes:
        settings = {"enable_checkpointing": True}
        extra = [saving(folder, every=SAVED)]
    callbacks, model = setting.callbacks(), setting.make(Sharded, optimizer="adamw")
    trainer = fit(
        model,
        batches if ranks == 1 else shard(batches, BOUNDS[ranks]),
        [*callbacks, *extra],
        strategy=ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1),
        devices=ranks,
        precision="32-true",
        **settings,
    )
    assert type(model.head.weight.data).__name__ == "DTensor"  # control: the strategy did split the parameters
    weights = {key: full_tensor(value).detach() for key, value in model.state_dict().items()}
    return {"step": trainer.global_step, "weights": weights, "states": [one.state_dict() for one in callbacks]}


def nursery(folder: Path) -> None:
    for number, name in enumerate(NAMES):
        own = folder / str(number)
        own.mkdir()
        fork_ranks(2, own, "straight", train, 2, name, own, False)
        fork_ranks(2, own, "resumed", train, 2, name, own, True)
        fork_ranks(1, own, "alone", train, 1, name, own, True)


@pytest.mark.distributed
@pytest.mark.slow
def test_resume_from_a_distributed_checkpoint(tmp_path: Path):
    run_in_nursery(nursery, tmp_path, seconds=1500)
    for number, name in enumerate(NAMES):
        folder = tmp_path / str(number)
        assert len([*(folder / f"step={SAVED}.ckpt").glob("*.distcp")]) == 2  # the shards of each process
        straight, resumed = (
            [torch.load(folder / f"{kind}-{rank}.pt") for rank in range(2)] for kind in ("straight", "resumed")
        )
        if name == "mutual information":  # each process goes on from the mean of all, so that their sum is right
            losses = [torch.stack([one["states"][0].pop("loss") for one in ranks]) for ranks in (straight, resumed)]
            assert_close(name, losses[1].sum(0), losses[0].sum(0), rtol=1e-6, atol=0)
        for found, expected in zip(resumed, straight, strict=True):
            assert_close(name, found, expected, rtol=0, atol=0)
            assert found["step"] == 12
        alone = torch.load(folder / "alone-0.pt")
        tolerance = SETTINGS[name].tolerance or {"rtol": 1e-6, "atol": 1e-6}
        assert_close(f"{name}, on one process", alone["weights"], straight[0]["weights"], **tolerance)


def save_whole(rank: int, folder: str) -> dict[str, Any]:
    """Leave a file of whole weights behind, in the middle of the second epoch; the weights at the end."""
    act_as_rank(rank, 2)
    model = SETTINGS["vne, queue"].make(Sharded, optimizer="adamw")
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    callbacks = [*SETTINGS["vne, queue"].callbacks(), saving(folder, every=SAVED)]
    settings: dict[str, Any] = {"strategy": strategy, "devices": 2, "precision": "32-true"}
    fit(model, shard(as_double(BATCHES), BOUNDS[2]), callbacks, enable_checkpointing=True, **settings)
    return {key: full_tensor(value).detach() for key, value in model.state_dict().items()}


@pytest.mark.distributed
def test_a_file_of_whole_weights_serves_one_device_and_compression(tmp_path: Path):
    straight, _ = run_on_ranks(save_whole, 2, tmp_path, str(tmp_path))
    model = SETTINGS["vne, queue"].make(optimizer="adamw").double()
    path = tmp_path / f"step={SAVED}.ckpt"
    fit(model, BATCHES, SETTINGS["vne, queue"].callbacks(), ckpt_path=path)
    torch.testing.assert_close(dict(model.state_dict()), straight, rtol=1e-6, atol=1e-6)
    assert len(factorize(model, 2, ["backbone.2"]).backbone[2]) == 2
