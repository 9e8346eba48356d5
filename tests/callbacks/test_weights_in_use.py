"""Weights are looked up when they are used, whatever other callbacks did to them since the start."""

import logging
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, ModelPruning
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D

from lightning_plugins.callbacks import (
    HybridCompression,
    Phase,
    SpectrumMonitor,
    StableRankRegularization,
    VNERegularization,
)
from tests.models import Classifier, fit, make_batches

BATCHES = make_batches(4)


def term(weight: Tensor) -> Tensor:
    s = torch.linalg.svdvals(weight)
    return (s**2).sum() / s[0] ** 2


class ByHand(Classifier):
    """The term as part of the loss, of the weight that the layer computes with."""

    by_hand = True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) + (0.3 * term(self.head.weight) if self.by_hand else 0)


REPARAMETRIZE: dict[str, Any] = {
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.4),
    "pruning twice": lambda layer: [prune.l1_unstructured(layer, "weight", amount=0.3) for _ in range(2)],
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "the older weight norm": torch.nn.utils.weight_norm,
    "a parametrization": lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", nn.Tanh()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("case", REPARAMETRIZE)
def test_a_computed_weight_passes_the_gradient_on(case: str):
    models = []
    for by_hand in (True, False):
        torch.manual_seed(0)
        model = ByHand(lr=0.02)
        model.by_hand = by_hand
        REPARAMETRIZE[case](model.head)
        fit(model, BATCHES, [] if by_hand else [StableRankRegularization("head", 0.3)])
        models.append(model)
    one, other = (dict(model.named_parameters()) for model in models)
    # under a spectral norm the vectors move at each computation, of which the reference has one more a step
    tolerance = {"rtol": 5e-2, "atol": 5e-3} if case == "spectral norm" else {}
    torch.testing.assert_close(one, other, **tolerance)


class Reparametrizes(Callback):
    """Puts something on a weight in the middle of the training."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            prune.l1_unstructured(pl_module.head, "weight", amount=0.4)


def test_a_weight_that_is_pruned_later_stays_regularised():
    models = []
    for by_hand in (True, False):
        torch.manual_seed(0)
        model = ByHand(lr=0.02)
        model.by_hand = by_hand
        fit(model, BATCHES, [Reparametrizes(), *([] if by_hand else [StableRankRegularization("head", 0.3)])])
        models.append(model)
    torch.testing.assert_close(*(dict(model.named_parameters()) for model in models))


def test_beside_lightnings_pruning_every_step_logs_the_term():
    class Counts(StableRankRegularization):
        count = 0

        def _add(self, *args: Any) -> None:
            self.count += 1
            super()._add(*args)

    callback = Counts("head", 0.3)
    pruning = ModelPruning(
        "l1_unstructured", parameter_names=["weight"], amount=0.5, use_lottery_ticket_hypothesis=False
    )
    trainer = fit(Classifier(), BATCHES, [pruning, callback], max_epochs=3)
    assert callback.count == trainer.global_step == 12


def test_a_monitor_sees_a_pruned_weight_behind_the_step_and_not_before():
    monitor = SpectrumMonitor("head", every_n_steps=1, figures=False)
    model = Classifier()
    prune.l1_unstructured(model.head, "weight", amount=0.4)
    fit(model, BATCHES[:1], [monitor], max_epochs=1)
    expected = torch.linalg.svdvals((model.head.weight_orig * model.head.weight_mask).detach())
    torch.testing.assert_close(monitor.spectra["head"][1], expected.float(), rtol=1e-5, atol=1e-5)


def test_a_backbone_that_is_thawed_is_regularised_from_then_on():
    class Logs(StableRankRegularization):
        def __init__(self) -> None:
            super().__init__("backbone.*", 0.3)
            self.steps: list[int] = []

        def _add(self, pl_module: Any, *args: Any) -> None:
            self.steps.append(pl_module.global_step)
            super()._add(pl_module, *args)

    class Finetuned(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)

    callback = Logs()
    with pytest.warns(UserWarning, match="no effect until one is thawed"):
        fit(
            Finetuned(),
            BATCHES,
            [callback, BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)],
            max_epochs=3,
        )
    assert callback.steps == list(range(4, 12))


class Replaces(Callback):
    """Puts a sequence, or another layer, where a layer was."""

    def __init__(self, new: Any) -> None:
        self.new = new

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            pl_module.backbone[0] = self.new().double()
            if parameters := list(pl_module.backbone[0].parameters()):
                trainer.optimizers[0].add_param_group({"params": parameters})


@pytest.mark.parametrize(
    ("new", "names"),
    [
        (lambda: nn.Linear(6, 8), {"stable_rank/backbone.0"}),
        (
            lambda: nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 8)),
            {"stable_rank/backbone.0.0", "stable_rank/backbone.0.1"},
        ),
    ],
    ids=["another layer", "a sequence"],
)
def test_a_layer_that_is_replaced_is_found_by_its_name(new: Any, names: set[str]):
    trainer = fit(Classifier(), BATCHES, [Replaces(new), StableRankRegularization("backbone.0", 0.3)])
    assert names <= set(trainer.callback_metrics)


class Repeats(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1].expand(-1, 8)


def test_a_layer_without_a_weight_left_is_warned_of_once():
    with pytest.warns(UserWarning, match="no weight is left to work on") as caught:
        fit(Classifier(), BATCHES, [Replaces(Repeats), StableRankRegularization("backbone.0", 0.3)])
    assert sum("no weight is left" in str(w.message) for w in caught) == 1


@pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
def test_beside_hybrid_compression_the_order_does_not_matter(first: bool):
    class Sized(Classifier):
        example_input_array = torch.zeros(1, 6)

    torch.manual_seed(0)
    model = Sized(lr=0.01)
    rank = StableRankRegularization("backbone.*", 0.1)
    compression = HybridCompression("backbone.*", budget=0.6, cost="params", phase=Phase(begin=0.0, end=0.5))
    trainer = fit(
        model, BATCHES, [rank, compression] if first else [compression, rank], max_epochs=4, precision="32-true"
    )
    assert any(name.startswith("stable_rank/backbone") for name in trainer.callback_metrics)


def test_what_is_taken_and_what_is_passed_over_is_said(caplog: pytest.LogCaptureFixture):
    model = Classifier()
    model.more = nn.ModuleDict({"emb": nn.Embedding(4, 3), "lstm": nn.LSTM(3, 3), "gpt": Conv1D(3, 3)})
    with caplog.at_level(logging.INFO):
        fit(model, BATCHES[:1], [StableRankRegularization("*", 0.1), SpectrumMonitor("*", figures=False)], max_epochs=1)
    for name in ("StableRankRegularization", "SpectrumMonitor"):
        (said,) = (text for text in caplog.messages if text.startswith(f"{name}: works on"))
        assert "3 weights (backbone.0, backbone.2, head)" in said
        assert "more.emb (Embedding), more.lstm (LSTM), more.gpt (Conv1D)" in said


@pytest.mark.parametrize(
    ("layers", "near"),
    [
        ("model.head", "'head'"),
        ("head.input", "'head:input'"),
        ("net.backbone.2", "'backbone.2'"),
        ("2", "'backbone.2'"),
        ("backbone.0.output", "'backbone.0:output'"),
        ("module.backbone", "'backbone'"),
    ],
)
def test_near_misses_of_names(layers: str, near: str):
    with pytest.raises(ValueError, match=f"did you mean {near}"):
        fit(Classifier(), BATCHES[:1], [VNERegularization(layers, 0.1)])


def test_a_large_weight_and_a_single_row_are_warned_of():
    with pytest.warns(UserWarning, match=r"`weight=5` is large.*far below 0.5"):
        VNERegularization("head", weight=5)
    one = [tuple(part[:1] for part in batch) for batch in BATCHES]
    with pytest.warns(UserWarning, match="'head' gave one row, whose entropy is always 0") as caught:
        fit(Classifier(), one, [VNERegularization("head", 0.1)])
    assert sum("gave one row" in str(w.message) for w in caught) == 1
