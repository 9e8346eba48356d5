"""A training that was killed in the middle of an epoch goes on as if nothing had happened, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from tests._killed import Killed, fork_ranks, fork_to_be_killed, run_in_nursery, saving
from tests.contract_by_hand import Model
from tests.contract_ranks import BOUNDS, act_as_rank
from tests.contract_table import SETTINGS, assert_close
from tests.models import fit, make_batches, shard

BATCHES = make_batches(6)


class Job(NamedTuple):
    setting: str
    ranks: int = 1
    accumulate: int = 1

    @property
    def saves_every(self) -> int:
        return 4 // self.accumulate  # steps, of 6 / accumulate in each of two epochs

    @property
    def dies_at(self) -> int:
        return 10 // self.accumulate


JOBS = [
    *(Job(name) for name in SETTINGS),
    Job("distillation", ranks=2, accumulate=2),
    Job("distillation, layers", ranks=2),
    Job("vne, all at once", accumulate=2),
    Job("vne, queue", accumulate=2),
    Job("vne, all at once", ranks=2),
    Job("vne, queue", ranks=2, accumulate=2),
    Job("vne and monitor", ranks=2),
    Job("stable rank, followed", ranks=2),
    Job("stable rank, all at once", ranks=2, accumulate=2),
]


def train(rank: int, job: Job, folder: Path, dies: bool = False, ckpt_path: Path | None = None) -> dict[str, Any]:
    """Return the state after training; checkpoints are written only if it ``dies``."""
    setting, batches = SETTINGS[job.setting], BATCHES
    settings: dict[str, Any] = {"accumulate_grad_batches": job.accumulate, "ckpt_path": ckpt_path}
    if job.ranks > 1:
        act_as_rank(rank, job.ranks)
        batches = shard(BATCHES, BOUNDS[job.ranks])
        settings.update(strategy="ddp", devices=job.ranks)
    callbacks = setting.callbacks()
    extra: list[Callback] = []
    if dies:
        extra = [saving(folder, every=job.saves_every), Killed(job.dies_at)]
        settings["enable_checkpointing"] = True
    model = setting.make(optimizer="adamw").double()  # at once: Lightning restores weights before it converts them
    trainer = fit(model, batches, [*callbacks, *extra], **settings)
    states = [callback.state_dict() for callback in callbacks]
    return {"step": trainer.global_step, "weights": dict(model.state_dict()), "states": states}


def checkpoint_of(job: Job, folder: Path) -> Path:
    return folder / f"step={2 * job.saves_every}.ckpt"


def nursery(folder: Path) -> None:
    for number, job in enumerate(JOBS):
        own = folder / str(number)
        own.mkdir()
        fork_to_be_killed(job.ranks, own, train, job, own, True)
        fork_ranks(job.ranks, own, "straight", train, job, own)
        fork_ranks(job.ranks, own, "resumed", train, job, own, False, checkpoint_of(job, own))


@pytest.mark.distributed
def test_resume_after_sigkill_equals_uninterrupted(tmp_path: Path):
    run_in_nursery(nursery, tmp_path, seconds=600)
    for number, job in enumerate(JOBS):
        folder = tmp_path / str(number)
        checkpoint = torch.load(checkpoint_of(job, folder), weights_only=True)
        assert checkpoint["epoch"] == 1  # it died in the second epoch,
        assert checkpoint["global_step"] == 8 // job.accumulate  # behind two of its six batches
        for rank in range(job.ranks):
            resumed, straight = (torch.load(folder / f"{name}-{rank}.pt") for name in ("resumed", "straight"))
            assert_close(str(job), resumed, straight, rtol=0, atol=0)
            assert resumed["step"] == 12 // job.accumulate
        assert not (folder / "killed-0.pt").exists()


def without_queue(checkpoint: dict[str, Any]) -> None:
    (key,) = (key for key in checkpoint["callbacks"] if key.startswith("VNERegularization"))
    checkpoint["callbacks"][key]["queues"] = {}


def without_position(checkpoint: dict[str, Any]) -> None:
    del checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]


def without_steps(checkpoint: dict[str, Any]) -> None:
    (key,) = (key for key in checkpoint["callbacks"] if key.startswith("StableRankRegularization"))
    checkpoint["callbacks"][key]["steps"] = {}


def without_vectors(checkpoint: dict[str, Any]) -> None:
    (key,) = (key for key in checkpoint["callbacks"] if key.startswith("StableRankRegularization"))
    assert checkpoint["callbacks"][key]["starts"]
    checkpoint["callbacks"][key]["starts"] = {}


# name of the setting, what is taken away, how much the weights differ in the end at least
DAMAGES = [
    ("vne, queue", without_queue, 1e-4),
    ("vne, queue", without_position, 1e-4),
    ("stable rank, all at once", without_steps, 1e-4),
    ("stable rank, followed", without_vectors, 1e-9),  # rounding errors are a millionth of that
]


@pytest.mark.parametrize(("name", "damage", "least"), DAMAGES)
def test_what_a_checkpoint_holds_matters(
    name: str, damage: Callable[[dict[str, Any]], None], least: float, tmp_path: Path
):
    """The control of the tests above: a checkpoint that lacks something gives another training."""
    setting = SETTINGS[name]
    model: Model = setting.make(optimizer="adamw").double()
    fit(model, BATCHES, [*setting.callbacks(), saving(tmp_path, every=8)], enable_checkpointing=True)
    path = tmp_path / "step=8.ckpt"
    checkpoint = torch.load(path)
    damage(checkpoint)
    torch.save(checkpoint, path)
    resumed = setting.make(optimizer="adamw").double()
    fit(resumed, BATCHES, setting.callbacks(), ckpt_path=path)
    differences: list[Tensor] = [
        (value - model.state_dict()[name]).abs().max() for name, value in resumed.state_dict().items()
    ]
    assert max(differences) > least
