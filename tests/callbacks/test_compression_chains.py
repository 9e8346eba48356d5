"""A compression that is resumed, and resumed again, from any step, is the uninterrupted one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_plugins.callbacks import HybridCompression, LowRankCompression, MaskScheduling, RankScheduling, Timing
from tests._killed import saving
from tests.callbacks.budgets import BATCHES, in_steps
from tests.callbacks.test_compression_resume import seeded
from tests.models import fit

SETTINGS: dict[str, Any] = {"enable_checkpointing": True, "max_epochs": 6}

TIMING = Timing(search_at=6, factorize_at=25, unit="steps")


def make(kind: Any) -> Any:
    if kind is LowRankCompression:
        return LowRankCompression("backbone.*", budget=0.6, search="energy", timing=TIMING)
    return in_steps(kind, begin=4, end=25, budget=0.6)


class Watch(Callback):
    """The place in its epoch of every batch before which the network changed its size."""

    def __init__(self) -> None:
        self.size, self.places = 0, list[int]()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.size = self.now(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        size, self.size = self.size, self.now(pl_module)
        if size != self.size:
            self.places.append(batch_idx)

    def now(self, pl_module: Any) -> int:
        own = ("channel_masks", "rank_thresholds")
        return sum(p.numel() for name, p in pl_module.named_parameters() if not name.startswith(own))


def train(kind: Any, folder: Path, **settings: Any) -> tuple[dict[str, Any], Any, list[int]]:
    model, callback, watch = seeded(), make(kind), Watch()
    fit(model, BATCHES, [callback, watch, saving(folder)], **{**SETTINGS, **settings})
    return dict(model.state_dict()), callback, watch.places


KINDS = [HybridCompression, MaskScheduling, RankScheduling, LowRankCompression]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chain", [(20, 26), (8, 15, 23)])
def test_a_chain_within_epochs_equals_uninterrupted(kind, chain, tmp_path):
    weights, callback, _ = train(kind, tmp_path / "straight")
    folder = tmp_path / "straight"
    for link, step in enumerate(chain):
        found, resumed, _ = train(kind, tmp_path / str(link), ckpt_path=folder / f"step={step}.ckpt")
        folder = tmp_path / str(link)
    torch.testing.assert_close(found, weights, rtol=0, atol=0)
    assert resumed.report.to_json() == callback.report.to_json()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chain", [(18, 27), (12, 20, 26), (24, 26), (6, 12, 27), (18, 24, 27)])
def test_a_chain_from_an_epochs_end_changes_the_network_between_epochs(kind, chain, tmp_path):
    """Behind an epoch's last batch Lightning leaves a hook out, and calls it within an epoch when it resumes again."""
    train(kind, tmp_path / "straight")
    folder = tmp_path / "straight"
    for link, step in enumerate(chain):
        _, resumed, places = train(kind, tmp_path / str(link), ckpt_path=folder / f"step={step}.ckpt")
        folder = tmp_path / str(link)
    assert resumed.finished
    assert set(places) <= {0}  # or behind the last epoch
