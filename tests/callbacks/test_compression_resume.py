"""A compression under a budget that was killed goes on as if nothing had happened, on one process and on two."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from tests._killed import Killed, fork_ranks, fork_to_be_killed, run_in_nursery, saving
from tests.callbacks.budgets import BATCHES, STEPS, Model
from tests.callbacks.budgets import seeded as seeded_as
from tests.contract_compression import COMPRESSIONS
from tests.contract_ranks import BOUNDS, act_as_rank
from tests.models import fit, shard

PHASES = {"warm-up": 2, "schedule": 7, "frozen": 11, "fine-tuned": 15}


class Decayed(Model):
    """An optimizer with groups in another order than the parameters, and a schedule."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) * self.trainer.world_size

    def configure_optimizers(self) -> Any:
        plain = [p for name, p in self.named_parameters() if name.endswith("bias")]
        decayed = [p for name, p in self.named_parameters() if name.endswith("weight")]
        groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed}]
        optimizer = torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def seeded(kind: Any = Decayed) -> Any:
    return seeded_as(kind)


def compression(row: str = "hybrid", **settings: Any) -> Any:
    return COMPRESSIONS[row].callback(end=9, **settings)


def assert_same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def run_straight(folder: Path, callback: Any) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    model = seeded()
    fit(model, BATCHES, [callback, saving(folder)], enable_checkpointing=True, max_epochs=3)
    return folder, dict(model.state_dict()), callback.state_dict()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The checkpoints of all steps of one training, its weights, and the callback's state."""
    return run_straight(tmp_path_factory.mktemp("straight"), compression())


@pytest.mark.parametrize("step", [1, 3, 4, 6, 7, 9, 10, 12, 13, 17])
def test_resume_at_any_step_equals_uninterrupted(step, straight):
    folder, weights, state = straight
    model, callback = seeded(), compression()
    fit(model, BATCHES, [callback], ckpt_path=folder / f"step={step}.ckpt", max_epochs=3)
    assert_same(dict(model.state_dict()), weights)
    assert callback.state_dict() == state


@pytest.mark.parametrize(
    ("row", "settings"),
    [("magnitude", {}), ("masks", {}), ("ranks", {}), ("ranks", {"refresh_every": 3})],
    ids=["magnitude", "masks", "ranks", "refreshed"],
)
def test_other_choices_resume(row, settings, tmp_path):
    folder, weights, state = run_straight(tmp_path, compression(row, **settings))
    for step in (2, 5, 10, 15):
        model, callback = seeded(), compression(row, **settings)
        fit(model, BATCHES, [callback], ckpt_path=folder / f"step={step}.ckpt", max_epochs=3)
        assert_same(dict(model.state_dict()), weights)
        assert callback.state_dict() == state


class Job(NamedTuple):
    row: str
    phase: str
    ranks: int = 1

    @property
    def step(self) -> int:
        return PHASES[self.phase]


JOBS = [
    *(Job(row, phase) for row in COMPRESSIONS for phase in PHASES),
    *(Job("hybrid", phase, ranks=2) for phase in PHASES),
]
STRAIGHT = dict.fromkeys((job.row, job.ranks) for job in JOBS)


def train(rank: int, folder: Path, job: Job, what: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"max_epochs": 3}
    batches: Any = BATCHES
    if job.ranks > 1:
        act_as_rank(rank, job.ranks)
        batches = shard(BATCHES, BOUNDS[job.ranks])
        settings.update(strategy="ddp", devices=job.ranks)
    callback = compression(job.row)
    callbacks: list[Callback] = [callback]
    if what == "killed":
        callbacks += [saving(folder), Killed(job.step)]
        settings["enable_checkpointing"] = True
    if what == "resumed":
        settings["ckpt_path"] = folder / f"step={job.step}.ckpt"
    model = seeded()
    fit(model, batches, callbacks, **settings)
    return {"weights": dict(model.state_dict()), "report": callback.report.to_json()}


def nursery(folder: Path) -> None:
    for row, ranks in STRAIGHT:
        own = folder / f"{row}-{ranks}"
        own.mkdir()
        fork_ranks(ranks, own, "straight", train, own, Job(row, "warm-up", ranks), "straight")
    for job in JOBS:
        own = folder / "-".join(map(str, job))
        own.mkdir()
        fork_to_be_killed(job.ranks, own, train, own, job, "killed")
        fork_ranks(job.ranks, own, "resumed", train, own, job, "resumed")


@pytest.mark.distributed
def test_resume_after_sigkill_in_every_phase_equals_uninterrupted(tmp_path):
    run_in_nursery(nursery, tmp_path)
    for job in JOBS:
        for rank in range(job.ranks):
            resumed = torch.load(tmp_path / "-".join(map(str, job)) / f"resumed-{rank}.pt")
            straight = torch.load(tmp_path / f"{job.row}-{job.ranks}" / f"straight-{rank}.pt")
            assert_same(resumed["weights"], straight["weights"])
            assert resumed["report"] == straight["report"]
    one, two = (torch.load(tmp_path / f"hybrid-{ranks}" / "straight-0.pt") for ranks in (1, 2))
    assert two["report"] == one["report"]
    torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-5, atol=1e-6)  # the ranks' batches are unequal
