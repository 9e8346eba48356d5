"""Task batches split over ranks, a training that is killed, and what FSDP2 is told."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torchmetrics import MeanSquaredError

from lightning_plugins.callbacks import VNERegularization
from lightning_plugins.meta import EpisodeLoader, TaskSet, Vectorization, use_per_step_statistics
from lightning_plugins.mixins import InnerSettings, MAMLMixin
from tests._killed import Killed, fork_to_be_killed, run_in_nursery, saving
from tests._processes import run_on_ranks
from tests.contract_ranks import act_as_rank
from tests.mixins.few_shot import RATE, FewGAP, make_tasks, shard_tasks, weights
from tests.models import Batches, fit

BATCHES, BOUNDS = make_tasks(), [0, 1, 5]


class WithNorms(MAMLMixin, LightningModule):
    def __init__(self) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
        network = use_per_step_statistics(network, 2)
        super().__init__(network, F.mse_loss, inner=InnerSettings(steps=2, learning_rate=RATE), learning_rate=0.01)


CASES = {
    "GAP": (lambda: FewGAP(metrics={"mse": MeanSquaredError()}), list),
    "chunked": (lambda: FewGAP(inner={"vectorize": Vectorization(chunk_size=2)}), list),
    "looped": (lambda: FewGAP(inner={"vectorize": False}), list),
    "statistics per step": (WithNorms, list),
    "VNE": (lambda: FewGAP(features="3"), lambda: [VNERegularization("query_features", weight=0.3)]),
}


def train(name: str, batches: list[Any], **settings: Any) -> tuple[Any, Any]:
    make, callbacks = CASES[name]
    model = make()
    trainer = fit(model, batches, callbacks(), validation=Batches(batches[:2]), max_epochs=1, **settings)
    return weights(model), dict(trainer.callback_metrics)


def train_on_rank(rank: int) -> Any:
    act_as_rank(rank, 2)
    mine = shard_tasks(BATCHES, BOUNDS)
    found = {name: train(name, mine, strategy="ddp", devices=2) for name in CASES}
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    with pytest.raises(MisconfigurationException) as refusal:
        fit(FewGAP(), mine, strategy=strategy, devices=2, precision="32-true")
    return found, str(refusal.value)


@pytest.mark.distributed
def test_unequal_ranks_equal_one_process(tmp_path: Path):
    """Weights, gains and statistics; the training loss of the last step and what is logged of validation, too."""
    ranks = run_on_ranks(train_on_rank, 2, tmp_path)
    for name in CASES:
        expected = train(name, BATCHES)
        for found, refusal in ranks:
            torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
            assert "FSDP2 (ModelParallelStrategy) splits them over ranks; pass `strategy='ddp'`" in refusal


# Eleven tasks over two ranks, in batches of different sizes: the mean of the batches' means is another number.
ELEVEN = [*make_tasks(1, 7, seed=3), *make_tasks(1, 4, seed=4)]
SHARES = [[(0, 4), (0, 1)], [(4, 7), (1, 4)]]


def share(rank: int) -> list[Any]:
    return [
        tuple(tuple(tensor[slice(*bounds)] for tensor in pair) for pair in batch)
        for batch, bounds in zip(ELEVEN, SHARES[rank], strict=True)
    ]


def evaluate(batches: list[Any], **settings: Any) -> dict[str, float]:
    model = FewGAP(metrics={"mse": MeanSquaredError()}).double()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, use_distributed_sampler=False, **settings
    )
    loader = Batches([tuple(tuple(part.double() for part in pair) for pair in batch) for batch in batches])
    return {**trainer.validate(model, loader, verbose=False)[0], **trainer.test(model, loader, verbose=False)[0]}


def evaluate_on_rank(rank: int) -> Any:
    act_as_rank(rank, 2)
    return evaluate(share(rank), strategy="ddp", devices=2)


@pytest.mark.distributed
def test_evaluation_counts_every_task_once(tmp_path: Path):
    batch = tuple(tuple(torch.cat(parts) for parts in zip(*pairs, strict=True)) for pairs in zip(*ELEVEN, strict=True))
    double = tuple(tuple(part.double() for part in pair) for pair in batch)
    model = FewGAP().double().eval()
    losses = model.adapt_and_measure(double).losses.detach()
    alone = evaluate(ELEVEN)
    for found in (alone, *run_on_ranks(evaluate_on_rank, 2, tmp_path)):
        for stage in ("val", "test"):
            assert found[f"{stage}/loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
            assert found[f"{stage}/mse"] == pytest.approx(losses.mean().item(), rel=1e-6)  # which is the loss here


class Plane(TaskSet):
    def sample(self, tasks: int, generator: torch.Generator) -> Any:
        x, query = (torch.randn(tasks, 5, 2, generator=generator) + torch.rand(()) for _ in range(2))  # a transform
        return (x, x.sum(-1, keepdim=True)), (query, query.sum(-1, keepdim=True))


class WithDropout(MAMLMixin, LightningModule):
    def __init__(self) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 1))
        super().__init__(network, F.mse_loss, inner=InnerSettings(steps=2, learning_rate=RATE), learning_rate=0.01)


# Batches of four: within an epoch, and between two.
@pytest.mark.parametrize(("loader", "when"), [("batches", 2), ("batches", 4), ("episodes", 6), ("episodes", 8)])
def test_resumed_dropout_draws_what_it_would_have_drawn(tmp_path: Path, loader: str, when: int):
    def data() -> Any:
        if loader == "episodes":
            return EpisodeLoader(Plane(), 20, 5)
        return Batches(BATCHES)

    model, resumed = WithDropout().double(), WithDropout().double()
    torch.manual_seed(5)
    fit(model, data(), [saving(tmp_path, every=2)], enable_checkpointing=True, max_epochs=3)
    expected = torch.rand(())
    torch.manual_seed(99)
    fit(resumed, data(), max_epochs=3, ckpt_path=tmp_path / f"step={when}.ckpt")
    torch.testing.assert_close(weights(resumed), weights(model), rtol=0, atol=0)
    torch.testing.assert_close(torch.rand(()), expected, rtol=0, atol=0)


def train_until_killed(rank: int, folder: Path) -> None:
    fit(FewGAP().double(), BATCHES, [saving(folder, every=2), Killed(7)], enable_checkpointing=True, max_epochs=3)


def nursery(folder: Path) -> None:
    fork_to_be_killed(1, folder, train_until_killed, folder)


@pytest.mark.distributed
def test_resume_after_sigkill_equals_uninterrupted(tmp_path: Path):
    run_in_nursery(nursery, tmp_path)
    model, resumed, shorter = (FewGAP().double() for _ in range(3))
    fit(model, BATCHES, max_epochs=3)
    fit(resumed, BATCHES, max_epochs=3, ckpt_path=tmp_path / "step=6.ckpt")  # in the middle of the second epoch
    torch.testing.assert_close(weights(resumed), weights(model), rtol=0, atol=0)
    fit(shorter, BATCHES, max_epochs=2)
    assert not torch.equal(shorter.gains()["2"], model.gains()["2"])  # control: the rest of the training matters
