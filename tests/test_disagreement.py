"""Ranks that do not do the same: none waits in vain, none trains on in silence, and messages name layer and rank.

All kinds end on all ranks together, so one process group serves them one after the other: that it still does is part of
the test. Those that end by the time-out of the group stand in `tests.test_disagreement_waits`.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from lightning_plugins.callbacks import (
    CollapseAlarm,
    Distillation,
    HybridCompression,
    LayerProbe,
    LowRankCompression,
    MatchedOutputs,
    MutualInformationMonitor,
    Readout,
    RepresentationMonitor,
    SpectralNormCap,
    SpectrumMonitor,
    StableRankRegularization,
    VNERegularization,
)
from lightning_plugins.regularizers import VonNeumannEntropy
from lightning_plugins.schedules import Linear
from tests._processes import run_on_ranks
from tests.contract_by_hand import Model
from tests.contract_ranks import act_as_rank
from tests.models import fit, make_batches, shard

pytestmark = pytest.mark.distributed

BATCHES = make_batches(4)
LAYERS = ["backbone.0", "backbone.1"]
TIME_OUT = 8.0


def on_rank_one() -> bool:
    return os.environ.get("RANK") == "1"


class Uneven(Model):
    """Does something else on rank 1 in the second step, or in all."""

    def __init__(self, does: str = "", *, always: bool = False) -> None:
        super().__init__()
        self.does, self.always = does, always
        self.example_input_array = torch.zeros(2, 6)
        if on_rank_one() and does == "has its head in front":
            self.backbone = self._modules.pop("backbone")

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        own = on_rank_one() and (self.always or self.global_step == 1)
        if own and self.does == "raises":
            raise ArithmeticError("out of luck")
        if own and self.does == "returns nothing":
            return None
        if own and self.does == "calls twice":
            self.backbone(batch[0])
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if own and self.does == "has no loss" else loss

    def forward(self, x: Tensor) -> Tensor:
        if on_rank_one() and self.does == "skips" and (self.always or self.global_step == 1):
            return self.head(self.backbone[2](torch.tanh(self.backbone[0](x))))
        return super().forward(x)


def narrower(features: Tensor) -> Tensor:
    return features[:, :4] if on_rank_one() else features


def undefined(features: Tensor) -> Tensor:
    everywhere = torch.ones_like(features, dtype=torch.bool)
    return features.masked_fill(everywhere, float("nan")) if on_rank_one() else features


def wrong(features: Tensor) -> Any:
    return 0.5 if on_rank_one() else features


def vne(layers: Any = LAYERS, **settings: Any) -> list[Callback]:
    return [VNERegularization(layers, weight=0.3, **settings)]


def made(does: str = "", **settings: Any) -> Uneven:
    torch.manual_seed(0)
    return Uneven(does, **settings)


def attempt(
    model: Uneven,
    callbacks: list[Callback],
    bounds: Sequence[int] = (0, 3, 8),
    batches: Any = BATCHES,
    **settings: Any,
) -> dict[str, Any]:
    """Outcome of a training: the error, or weights and log."""
    settings = {"max_epochs": 1, **settings}
    try:
        trainer = fit(model, shard(batches, bounds), callbacks, strategy="ddp", devices=2, **settings)
    except Exception as error:  # noqa: BLE001  # it is looked at by the test
        return {"error": f"{type(error).__name__}: {error}"}
    return {"weights": dict(model.state_dict()), "log": dict(trainer.callback_metrics)}


# Callbacks to which something else is given on rank 1, and how the message on rank 0 names what it was given.
Make = Callable[[int], list[Callback]]
ARGUMENTS: dict[str, tuple[str, Make]] = {
    "another weight of rows": ("'weight': 0.3", lambda rank: [VNERegularization("head", 0.3 + rank / 10)]),
    "another weight of weights": ("'weight': 0.1", lambda rank: [StableRankRegularization("head", 0.1 + rank)]),
    "layers named in another order": ("('backbone.0', 'backbone.1')", lambda rank: vne(LAYERS[:: 1 - 2 * rank])),
    "another cap": ("'maximum': 1.0", lambda rank: [SpectralNormCap("head", 1.0 + rank)]),
    "another limit": ("'minimum': 0.5", lambda rank: [CollapseAlarm("backbone", limits=0.5 + rank)]),
    "other looks": (
        "'every_n_steps': 3",
        lambda rank: [SpectrumMonitor("head", every_n_steps=3 + rank, figures=False)],
    ),
    "other metrics": (
        "('entropy',)",
        lambda rank: [RepresentationMonitor("head", metrics=["entropy", "rankme"][: 1 + rank], figures=False)],
    ),
    "other folds": ("'folds': 3", lambda rank: [LayerProbe("backbone", 1, probe={"folds": 3 + rank}, figures=False)]),
    "other pairs": ("'calls'", lambda rank: [MutualInformationMonitor("backbone", pairs=["calls", "halves"][rank])]),
    "another temperature": (
        "'temperature': 1.0",
        lambda rank: [Distillation(outputs=MatchedOutputs(temperature=1.0 + rank))],
    ),
    "another budget": ("budget=0.5", lambda rank: [HybridCompression("*", 0.5 + rank / 10, cost="params")]),
    "another budget of ranks": ("'beam', 0.6", lambda rank: [LowRankCompression("backbone.*", budget=0.6 + rank / 10)]),
    "another schedule": ("until=2", lambda rank: vne("head", schedule=Linear(0.0, 1.0, until=2 + rank, unit="steps"))),
}


def disagree(rank: int) -> dict[str, dict[str, Any]]:
    act_as_rank(rank, 2)
    _set_pg_timeout(timedelta(seconds=5 * TIME_OUT))
    other = LAYERS[: 1 + rank]
    return {
        "a layer is skipped": attempt(made("skips"), vne()),
        "an exception": attempt(made("raises"), [*vne(), *vne("head:input")]),
        "no loss at all": attempt(made("returns nothing"), vne()),
        "called more often": attempt(made("calls twice"), vne("backbone.1")),
        "an empty batch": attempt(made(), vne(), bounds=(0, 8, 8)),
        "a loss that is NaN": attempt(made("has no loss"), vne()),
        "NaN is left out": attempt(made(), vne("head:input", readout=Readout(pool=undefined))),
        "NaN shall raise": attempt(made(), vne("head:input", readout=Readout(pool=undefined), on_nonfinite="raise")),
        "other layers": attempt(made(), vne(other)),
        "other weights": attempt(made(), [StableRankRegularization(["backbone.0", "head"][: 1 + rank], 0.1)]),
        "another order of layers": attempt(made("has its head in front"), vne(["backbone.0", "head"])),
        **{name: attempt(made(), make(rank)) for name, (_, make) in ARGUMENTS.items()},
        "other callbacks first": attempt(made(), [*vne("backbone.0"), *vne("backbone.1")][:: 1 - 2 * rank]),
        "other widths": attempt(made(), vne("backbone", readout=Readout(pool=narrower))),
        "a pool that fails": attempt(made(), vne("backbone", readout=Readout(pool=wrong))),
        "no rows for a monitor": attempt(made("skips", always=True), monitor()),
        "other widths in a monitor": attempt(made(), monitor(readout=Readout(pool=narrower))),
        "matrices of other widths": {"error": entropy_of(torch.ones(3, 4 + rank))},
        "no matrix on one rank": {"error": entropy_of(torch.ones(*[3] * (2 + rank)))},
        "all is well": attempt(made(), vne()),
    }


def entropy_of(embeddings: Tensor) -> str:
    """The message, without any callback."""
    try:
        VonNeumannEntropy(0.1).entropy(embeddings)
    except Exception as error:  # noqa: BLE001  # it is looked at by the test
        return f"{type(error).__name__}: {error}"
    return ""


def monitor(**settings: Any) -> list[Callback]:
    return [RepresentationMonitor("backbone.1", every_n_steps=1, metrics=["entropy"], figures=False, **settings)]


FAILED = "RankError: `layers`: {!r}: rank 1 failed in this step, and its own error says why"
SAME = "must choose the same layers in the same order on every rank, got"
# name: (what rank 0 says, what rank 1 says)
MESSAGES = {
    "a layer is skipped": (FAILED.format("backbone.1"), "NotCapturedError: `layers`: 'backbone.1' was not called"),
    "an exception": (FAILED.format("backbone.0"), "ArithmeticError: out of luck"),
    "no loss at all": (FAILED.format("backbone.0"), "RuntimeError: Skipping the `training_step` by returning None"),
    "called more often": 2
    * ("'backbone.1': ranks must compute it equally often in a step, got 1 on rank 0, 2 on rank 1",),
    "NaN shall raise": tuple(
        f"the term of layer 'head' is nan, and its tensor {state} on rank {rank}"
        for rank, state in enumerate(("is finite", "holds NaN or Inf"))
    ),
    "other layers": (
        f"{SAME} backbone.0 on rank 0 and others on rank 1",
        f"{SAME} backbone.0, backbone.1 on rank 1 and others on rank 0",
    ),
    "other weights": (f"{SAME} backbone.0 (8, 6) on rank 0", f"{SAME} backbone.0 (8, 6), head (3, 5) on rank 1"),
    "another order of layers": (f"{SAME} backbone.0, head on rank 0", f"{SAME} head, backbone.0 on rank 1"),
    **{kind: (told, "on rank 1 and others on rank 0") for kind, (told, _) in ARGUMENTS.items()},
    "other callbacks first": (f"{SAME} backbone.0 on rank 0", f"{SAME} backbone.1 on rank 1"),
    "other widths": 2
    * ("'backbone': `embeddings` must have as many columns on every rank, got 5 on rank 0, 4 on rank 1",),
    "a pool that fails": (FAILED.format("backbone"), "'backbone': `pool` must return a floating tensor"),
    "other widths in a monitor": 2
    * ("'backbone.1' must have as many features on every rank, got 8 on rank 0, 4 on rank 1",),
    "matrices of other widths": 2 * ("ValueError: `embeddings` must have as many columns on every rank, got 4 on",),
    "no matrix on one rank": (
        "RankError: rank 1 failed in this step",
        "ValueError: `embeddings` must have shape (N, d)",
    ),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return run_on_ranks(disagree, 2, tmp_path_factory.mktemp("ranks"), seconds=240)


@pytest.mark.parametrize("kind", MESSAGES)
def test_all_ranks_end_and_name_layer_and_rank(kind: str, ranks: list[dict[str, Any]]):
    for found, wanted in zip(ranks, MESSAGES[kind], strict=True):
        assert wanted in found[kind].get("error", "trained on")


def alone(callbacks: list[Callback], does: str = "") -> dict[str, Any]:
    model = made(does)
    trainer = fit(model, BATCHES, callbacks, max_epochs=1)
    return {"weights": dict(model.state_dict()), "log": dict(trainer.callback_metrics)}


@pytest.mark.parametrize("kind", ["an empty batch", "all is well"])
def test_what_is_no_disagreement_trains_like_one_process(kind: str, ranks: list[dict[str, Any]]):
    expected = alone(vne())["weights"]
    for found in ranks:
        torch.testing.assert_close(found[kind]["weights"], expected, rtol=1e-6, atol=1e-6)


def test_nan_of_one_rank_is_the_same_on_all(ranks: list[dict[str, Any]]):
    """A term that is left out is left out on all ranks; a main loss that is NaN spoils the weights of all alike."""
    expected = alone([])["weights"]
    for found in ranks:
        assert found["NaN is left out"]["weights"].keys() == expected.keys()
        torch.testing.assert_close(found["NaN is left out"]["weights"], expected, rtol=1e-6, atol=1e-6)
        assert all(weight.isnan().any() for weight in found["a loss that is NaN"]["weights"].values())


def test_a_rank_without_rows_joins_the_sums_of_a_monitor(ranks: list[dict[str, Any]]):
    name = "representation/train/backbone.1/entropy"
    values = [found["no rows for a monitor"]["log"][name] for found in ranks]
    assert values[0].isfinite()
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=0)
