"""Promises of every public callback over several processes: unequal ones train like one with the whole batch."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_plugins.callbacks import VNERegularization
from tests._processes import run_on_ranks
from tests.contract_by_hand import ByHand, Model
from tests.contract_ranks import BOUNDS, act_as_rank
from tests.contract_table import SETTINGS, assert_close
from tests.models import entropy_by_autograd, fit, make_batches, shard

pytestmark = pytest.mark.distributed

BATCHES = make_batches(6)
EXACT = {"rtol": 1e-6, "atol": 1e-6}
Result = tuple[dict[str, Tensor], dict[str, Tensor], list[Any]]


def outcome(model: nn.Module, callbacks: Sequence[Callback], settings: dict[str, Any]) -> Result:
    """Weights, logged values, and what a checkpoint holds of the callbacks after training."""
    trainer = fit(model, settings.pop("batches", BATCHES), callbacks, **settings)
    weights = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    held = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)["callbacks"]
    return weights, dict(trainer.callback_metrics), [held.get(callback.state_key) for callback in callbacks]


def assert_ranks_equal(results: list[Result], expected: Result, name: str) -> None:
    for rank, (weights, logged, states) in enumerate(results):
        for kind, found, wanted in zip(("weights", "log", "state"), (weights, logged, states), expected, strict=True):
            assert_close(f"{name}, {kind} on rank {rank}", found, wanted, **EXACT)
        assert_close(name, weights, results[0][0], rtol=0, atol=0)


def train_settings(rank: int, world_size: int) -> dict[str, Result]:
    act_as_rank(rank, world_size)
    mine, on_ranks = shard(BATCHES, BOUNDS[world_size]), {"strategy": "ddp", "devices": world_size}
    results = {}
    for name, setting in SETTINGS.items():
        results[name] = outcome(setting.make(), setting.callbacks(), {"batches": mine, **on_ranks})
    accumulated = {"batches": mine, "accumulate_grad_batches": 2, "gradient_clip_val": 0.2, **on_ranks}
    everything = SETTINGS["vne, all at once"]
    results["accumulated"] = outcome(everything.make(), everything.callbacks(), accumulated)
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_unequal_ranks_equal_one_process(world_size: int, tmp_path: Any):
    ranks = run_on_ranks(train_settings, world_size, tmp_path, world_size)
    for name, setting in SETTINGS.items():
        expected = outcome(setting.make(), setting.callbacks(), {})
        assert_ranks_equal([rank[name] for rank in ranks], expected, name)
        by_hand, _, _ = outcome(setting.reference(), [], {})
        assert_close(name, ranks[0][name][0], by_hand, **(setting.tolerance or EXACT))
    everything = SETTINGS["vne, all at once"]
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2}
    expected = outcome(everything.make(), everything.callbacks(), settings)
    assert_ranks_equal([rank["accumulated"] for rank in ranks], expected, "accumulated")


class WithProbe(Model):
    """Has a layer that its own loss does not use."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.probe = nn.Linear(6, 5)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        self.probed = self.probe(batch[0])
        return super().training_step(batch, batch_idx)


class WithProbeByHand(WithProbe):
    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_step % self.every_n_steps:
            return loss
        return loss - 0.3 * self.every_n_steps * entropy_by_autograd(self.probed)


class Recomputed(Model):
    """Activation checkpointing over the layers that the term looks at."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.backbone, x, use_reentrant=False))


class LocalByHand(ByHand):
    """The mean over the ranks of the entropies of their own rows."""

    def entropy(self, layer: str, view: Tensor) -> Tensor:
        bounds = BOUNDS[2]
        parts = [super(LocalByHand, self).entropy(layer, view[a:b]) for a, b in pairwise(bounds)]
        return torch.stack(parts).mean()


def seeded(kind: type[Model], **arguments: Any) -> Model:
    torch.manual_seed(0)
    model = kind(**arguments)
    model.every_n_steps = 1
    return model


def every_second(kind: type[Model]) -> Model:
    model = seeded(kind)
    model.every_n_steps = 2
    return model


def halved() -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    return {"plugins": MixedPrecision("16-mixed", "cpu", scaler), "precision": None, "gradient_clip_val": 0.2}


UNUSED = "ddp_find_unused_parameters_true"
# name: (model, what it is compared with in one process, callback, settings of the Trainer, tolerance)
Special = tuple[
    Callable[[], Any], Callable[[], Model], Callable[[], Callback], Callable[[], dict[str, Any]], dict[str, float]
]
SPECIAL: dict[str, Special] = {
    "a layer that only the term uses": (
        lambda: seeded(WithProbe),
        lambda: seeded(WithProbeByHand),
        lambda: VNERegularization("probe", weight=0.3),
        lambda: {"strategy": "ddp"},
        EXACT,
    ),
    "the same, DDP looking for unused parameters": (
        lambda: seeded(WithProbe),
        lambda: seeded(WithProbeByHand),
        lambda: VNERegularization("probe", weight=0.3),
        lambda: {"strategy": UNUSED},
        EXACT,
    ),
    "the same, really unused in every second step": (
        lambda: every_second(WithProbe),
        lambda: every_second(WithProbeByHand),
        lambda: VNERegularization("probe", weight=0.3, every_n_steps=2),
        lambda: {"strategy": UNUSED},
        EXACT,
    ),
    "activation checkpointing": (
        lambda: seeded(Recomputed),
        lambda: seeded(ByHand),
        lambda: VNERegularization("backbone.2", weight=0.3),
        lambda: {"strategy": "ddp"},
        EXACT,
    ),
    "activation checkpointing of two views": (
        lambda: seeded(Recomputed, views=2),
        lambda: seeded(ByHand, views=2),
        lambda: VNERegularization("backbone.2", weight=0.3),
        lambda: {"strategy": "ddp"},
        EXACT,
    ),
    "compiled": (
        lambda: torch.compile(seeded(Model), backend="aot_eager"),
        lambda: seeded(ByHand),
        lambda: VNERegularization("backbone.2", weight=0.3),
        lambda: {"strategy": "ddp"},
        EXACT,
    ),
    "each rank for itself": (
        lambda: seeded(Model),
        lambda: seeded(LocalByHand),
        lambda: VNERegularization("backbone", weight=0.3, scope="local"),
        lambda: {"strategy": "ddp"},
        EXACT,
    ),
    "fp16 with a scaler, clipped": (
        lambda: seeded(Model, width=3),  # whose exchanged matrix must not be in half precision
        lambda: seeded(ByHand, width=3),
        lambda: VNERegularization("backbone", weight=0.3),
        lambda: {"strategy": "ddp", **halved()},
        {"rtol": 1e-3, "atol": 1e-3},
    ),
}


def train_special(rank: int, world_size: int) -> dict[str, Result]:
    act_as_rank(rank, world_size)
    mine, results = shard(BATCHES, BOUNDS[world_size]), {}
    for name, (model, _, callback, settings, _) in SPECIAL.items():
        results[name] = outcome(model(), [callback()], {"batches": mine, "devices": world_size, **settings()})
    trained, callback = seeded(Model), VNERegularization("backbone", weight=0.3, queue_size=11)
    for _ in range(2):  # the same model and callback in a second training
        results["twice"] = outcome(trained, [callback], {"batches": mine, "strategy": "ddp", "devices": world_size})
    return results


def test_special_cases_on_two_ranks(tmp_path: Any):
    ranks = run_on_ranks(train_special, 2, tmp_path, 2)
    for name, (_, reference, _, settings, tolerance) in SPECIAL.items():
        weights, _, _ = outcome(reference(), [], {**settings(), "strategy": "auto"})
        for rank in ranks:
            assert_close(name, rank[name][0], weights, **tolerance)
    trained, callback = seeded(Model), VNERegularization("backbone", weight=0.3, queue_size=11)
    for _ in range(2):
        expected = outcome(trained, [callback], {})
    assert_ranks_equal([rank["twice"] for rank in ranks], expected, "twice")
