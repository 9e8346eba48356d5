from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_plugins.callbacks import MaskScheduling, RankScheduling
from lightning_plugins.compression import masks_of
from lightning_plugins.compression.costs.layer_costs import layer_costs
from tests.callbacks.budgets import BATCHES, END, Model, in_steps, params, seeded
from tests.callbacks.low_rank import assert_same
from tests.models import fit


@pytest.mark.parametrize("criterion", ["learned", "magnitude"])
@pytest.mark.parametrize("cost", ["params", "flops"])
def test_masks_alone_deliver_fewer_channels_within_the_budget(criterion, cost):
    model, callback = seeded(), in_steps(MaskScheduling, criterion=criterion, cost=cost, budget=0.4, update_every=2)
    fit(model, BATCHES, [callback], max_epochs=3)
    report = callback.report
    assert report.share <= 0.4
    assert report.after.params == params(model)
    assert {type(layer) for layer in model.backbone} == {nn.Linear, nn.Tanh, nn.ReLU}
    assert model.backbone[0].out_features == report.kept["backbone.0"].left == model.backbone[2].in_features
    assert report.ranks == {}
    assert report.share > 0.25  # what the budget leaves is used


class Chosen(Callback):
    def __init__(self) -> None:
        self.seen: list[list[list[bool]]] = []
        self.shares: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        masks = masks_of(pl_module)
        self.seen.append([] if masks is None else [keep.tolist() for keep in masks.kept()])
        self.shares.append(float(trainer.callback_metrics["budget/params"]))


def test_magnitudes_follow_the_cubic_schedule_and_keep_the_largest():
    model, chosen = seeded(), Chosen()
    norms = model.backbone[0].weight.detach().norm(dim=1)
    model.lr = 0.0
    fit(model, BATCHES, [in_steps(MaskScheduling, criterion="magnitude", update_every=2), chosen], max_epochs=3)
    assert chosen.shares[:4] == [1.0] * 4  # nothing is closed at the beginning of the schedule
    for step in (5, 7, 9):
        wanted = 1 - 0.5 * (1 - (1 - (step - 3) / 8) ** 3)
        assert wanted - 0.08 < chosen.shares[step] <= wanted
    assert chosen.seen[5] == chosen.seen[6]
    assert chosen.seen[6] != chosen.seen[7]
    keep = torch.tensor(chosen.seen[END][0])
    assert norms[keep].min() > norms[~keep].max()


def test_channels_closed_by_magnitude_open_again():
    class Grow(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 8:
                closed = ~masks_of(pl_module).kept()[0]
                pl_module.backbone[0].parametrizations.weight.original.data[closed] *= 100.0
                self.closed = closed

    grow, chosen = Grow(), Chosen()
    callback = in_steps(MaskScheduling, criterion="magnitude", update_every=2)
    fit(seeded(), BATCHES, [callback, grow, chosen], max_epochs=3)
    assert grow.closed.any()
    assert torch.tensor(chosen.seen[9][0])[grow.closed].all()


def test_ranks_alone_deliver_factors_within_the_budget():
    model, callback = seeded(), in_steps(RankScheduling, budget=0.6)
    model.example_input_array = None
    fit(model, BATCHES, [callback], max_epochs=3)
    assert params(model) == callback.report.after.params <= 0.6 * 399
    ranks = callback.report.ranks
    assert ranks
    assert callback.report.before.flops is None  # without an `example_input_array`
    for name, rank in ranks.items():
        pair = model.get_submodule(name)
        assert pair[0].out_features == rank == pair[1].in_features
        assert rank <= layer_costs(seeded())[name].break_even
    assert callback.report.kept == {}


@pytest.mark.parametrize("kind", [MaskScheduling, RankScheduling])
def test_learned_choices_answer_to_the_loss(kind):
    """With the loss's gradient turned around another network is delivered at the same budget."""
    reports = []
    for sign in (1, -1):
        more = {"thresholds": 0.1, "budget": 0.65} if kind is RankScheduling else {}
        model, callback = seeded(), in_steps(kind, layers="backbone.*", **more)
        rate = model.lr
        model.lr = rate * 0.0
        model.loss = lambda batch, model=model, sign=sign: sign * Model.loss(model, batch)
        fit(model, BATCHES, [callback], max_epochs=3)
        reports.append(callback.report)
    assert reports[0] != reports[1]


def test_refreshing_less_often_stays_within_the_budget():
    model = seeded()
    fit(model, BATCHES, [in_steps(RankScheduling, budget=0.6, refresh_every=3)], max_epochs=3)
    other = seeded()
    fit(other, BATCHES, [in_steps(RankScheduling, budget=0.6)], max_epochs=3)
    assert params(model) <= 0.6 * 399
    with pytest.raises(AssertionError):
        assert_same(model, other, rtol=0, atol=0)


def test_figures_are_handed_on(tmp_path):
    callback = in_steps(figures=True)
    fit(seeded(), BATCHES, [callback], max_epochs=3, default_root_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["choice.png", "compression.png"]
