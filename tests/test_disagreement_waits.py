"""Ranks of which one has ended while another waits: the wait ends by the time-out, in a message that names the rank."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch.distributed.distributed_c10d import _set_pg_timeout

from tests._processes import run_on_ranks
from tests.contract_ranks import act_as_rank
from tests.test_disagreement import BATCHES, TIME_OUT, attempt, made, monitor, on_rank_one, vne

pytestmark = pytest.mark.distributed


class Stops(Callback):
    """Behind the second step: in that one DDP exchanges something of its own, and would be the first to wait."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = on_rank_one() and trainer.global_step >= 2


def all_kinds() -> list[Callback]:
    return [*monitor(), *vne()]


def run_out(rank: int, folder: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """One rank has fewer batches than the other: it ends, or comes to the exchange at the end of an epoch."""
    act_as_rank(rank, 2)
    found = []
    for number, callbacks in enumerate((vne, monitor, all_kinds)):
        _set_pg_timeout(timedelta(seconds=TIME_OUT))
        begin = time.monotonic()
        found.append(attempt(made(), callbacks(), batches=BATCHES[: 4 - rank], **settings))
        found[-1]["seconds"] = time.monotonic() - begin
        dist.destroy_process_group()  # of no use after a time-out
        dist.init_process_group("gloo", init_method=f"file://{folder}/{number}", rank=rank, world_size=2)
    return found


@pytest.mark.parametrize("epochs", [1, 2])
def test_one_rank_has_fewer_batches(epochs: int, tmp_path: Path):
    ranks = run_on_ranks(run_out, 2, tmp_path, str(tmp_path), {"max_epochs": epochs}, seconds=200)
    in_steps, in_epochs, in_both = zip(*ranks, strict=True)
    waited = "waited in vain for another of 2 ranks, which has ended, stopped training early or is at another exchange"
    assert f"RankError: `layers`: 'backbone.0': rank 0 {waited}" in in_steps[0]["error"]
    assert "RuntimeError" in in_epochs[0]["error"]  # of DDP, which is the first to wait there
    assert f"RankError: rank 1 {waited}" in in_epochs[1]["error"]
    assert f"RankError: `layers`: 'backbone.0': rank 0 {waited}" in in_both[0]["error"]
    assert f"RankError: rank 1 {waited}" in in_both[1]["error"]
    assert max(found["seconds"] for found in (*in_steps, *in_epochs, *in_both)) < 3 * TIME_OUT + 20


def test_one_rank_has_fewer_batches_but_as_many_steps(tmp_path: Path):
    settings = {"max_epochs": -1, "max_steps": 6}
    ranks = run_on_ranks(run_out, 2, tmp_path, str(tmp_path), settings, seconds=200)
    in_steps, in_epochs, in_both = zip(*ranks, strict=True)
    # Steps meet steps, as in DDP without a term; both ranks end with the same weights.
    torch.testing.assert_close(in_steps[0]["weights"], in_steps[1]["weights"], rtol=0, atol=0)
    # The end of an epoch meets a step: no exchange is taken for another.
    for found in (*in_epochs, *in_both):
        assert "waited in vain for another of 2 ranks" in found["error"] or "RuntimeError" in found["error"]
    assert any("RankError: rank 1 waited in vain" in found["error"] for found in in_epochs)
    assert max(found["seconds"] for found in (*in_epochs, *in_both)) < 3 * TIME_OUT + 20


def stop_early(rank: int, folder: str) -> dict[str, Any]:
    act_as_rank(rank, 2)
    _set_pg_timeout(timedelta(seconds=TIME_OUT))
    begin = time.monotonic()
    found = attempt(made(), [*vne(), Stops()])
    found["seconds"] = time.monotonic() - begin
    dist.destroy_process_group()  # of no use after a time-out; the helper's own farewell needs one
    dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=2)
    return found


def test_one_rank_stops_early(tmp_path: Path):
    ranks = run_on_ranks(stop_early, 2, tmp_path, str(tmp_path), seconds=120)
    assert "RankError: `layers`: 'backbone.0': rank 0 waited in vain for another of 2 ranks" in ranks[0]["error"]
    assert max(found["seconds"] for found in ranks) < 3 * TIME_OUT + 20
