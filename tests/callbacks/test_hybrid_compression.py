import copy
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_plugins.callbacks import HybridCompression
from lightning_plugins.compression.budget.budgeted_network import BudgetedNetwork
from lightning_plugins.compression.low_rank.layers import truncated
from lightning_plugins.schedules import Constant, Cosine
from tests.callbacks.budgets import BATCHES, BEGIN, END, STEPS, Model, in_steps, params, seeded
from tests.callbacks.low_rank import assert_same
from tests.models import Batches, fit


def flops(model: Any) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        model(model.example_input_array.double())
    return counter.get_total_flops()


class Watch(Callback):
    """Record of module and callback at every step."""

    def __init__(self) -> None:
        self.parameters: list[list[int]] = []
        self.metrics: list[dict[str, float]] = []
        self.names: list[list[str]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        groups = [group["params"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.parameters.append([id(parameter) for group in groups for parameter in group])
        self.names.append(list(pl_module.state_dict()))
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.mark.parametrize("cost", ["params", "flops"])
@pytest.mark.parametrize("budget", [0.25, 0.6])
def test_delivers_a_network_within_the_budget(cost, budget):
    model, callback, watch = seeded(), in_steps(cost=cost, budget=budget), Watch()
    dense = {"params": params(model), "flops": flops(model)}
    fit(model, BATCHES, [callback, watch], max_epochs=3)
    left = {"params": params(model), "flops": flops(model)}
    report = callback.report
    assert {"params": report.before.params, "flops": report.before.flops} == dense
    assert {"params": report.after.params, "flops": report.after.flops} == left
    assert left[cost] <= budget * dense[cost]
    assert (report.cost, report.budget, report.share) == (cost, budget, left[cost] / dense[cost])
    assert f"{report.share:.3g} of the" in str(report)
    shares = [metrics[f"budget/{cost}"] for metrics in watch.metrics]
    assert shares[:BEGIN] == [1.0] * BEGIN
    assert shares[END] <= budget
    assert shares[-1] == pytest.approx(left[cost] / dense[cost])
    assert "mask/backbone.0/kept" in watch.metrics[5]
    assert "rank/backbone.2" in watch.metrics[5]


class LowRank(Model):
    """A layer of rank 2 between two with channels, of which a half hardly counts: both can go."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5))
        self.double()
        with torch.no_grad():
            wide, narrow = self.backbone[2], self.backbone[4]
            wide.weight.copy_(torch.randn(24, 2).double() @ torch.randn(2, 24).double() / 10)
            wide.weight[:12] *= 1e-3
            narrow.weight[:, :12] *= 1e-3


def test_some_of_both_go_where_both_can():
    callback = in_steps(budget=0.4)
    fit(seeded(LowRank), BATCHES, [callback], max_epochs=3)
    assert "backbone.2" in callback.report.ranks
    assert callback.report.kept["backbone.2"].left < 24


def test_the_small_network_is_the_masked_one(monkeypatch):
    seen = {}
    shrink = BudgetedNetwork.shrink

    def watched(network: BudgetedNetwork, choice: Any) -> Any:
        seen["masked"], seen["choice"] = copy.deepcopy(network.model), choice
        for group, keep in zip(network.groups, choice.kept, strict=True):
            for member in group.members:
                if member.side == "in":  # nothing reads a closed channel: it is zero
                    gone = (~keep[torch.tensor(member.units)]).nonzero()[:, 0]
                    seen["masked"].get_parameter(member.parameter).data.index_fill_(member.dim, gone, 0)
        replacements = shrink(network, choice)
        seen["small"] = copy.deepcopy(network.model)
        return replacements

    monkeypatch.setattr(BudgetedNetwork, "shrink", watched)
    fit(seeded(LowRank), BATCHES, [in_steps(budget=0.4)], max_epochs=3)
    for name, rank in seen["choice"].ranks.items():
        layer = seen["masked"].get_submodule(name)
        layer.weight.data = truncated(layer, rank, scheme=1)
    x = torch.cat([x for x, _ in BATCHES])
    torch.testing.assert_close(seen["small"](x), seen["masked"](x), rtol=1e-9, atol=1e-9)
    assert seen["choice"].ranks
    assert not all(keep.all() for keep in seen["choice"].kept)


def test_the_training_is_the_bare_one_until_it_begins():
    model, bare = seeded(optimizer="adamw"), seeded(optimizer="adamw")
    with pytest.warns(UserWarning, match="nothing was removed"):
        fit(model, BATCHES, [in_steps(begin=20, end=30)], max_epochs=3)
    fit(bare, BATCHES, max_epochs=3)
    assert_same(model, bare, rtol=0, atol=0)
    assert not hasattr(model, "channel_masks")


FORMS = {
    "one": lambda optimizer, schedule: optimizer,
    "list": lambda optimizer, schedule: [optimizer],
    "two lists": lambda optimizer, schedule: ([optimizer], [schedule]),
    "dict": lambda optimizer, schedule: {"optimizer": optimizer, "lr_scheduler": schedule},
    "nested": lambda optimizer, schedule: {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule, "interval": "step"},
    },
}


class Configured(Model):
    """Groups by the names of parameters, decay, and an optimizer in one of the forms that Lightning knows."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def configure_optimizers(self) -> Any:
        weights = [p for name, p in self.named_parameters() if name.endswith("weight")]
        others = [p for name, p in self.named_parameters() if not name.endswith("weight")]
        groups = [{"params": weights, "weight_decay": 5.0}, {"params": others, "lr": 0.02}]
        optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)
        return FORMS[self.form](optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9))


@pytest.mark.parametrize("form", FORMS)
def test_optimizers_never_see_the_scores(form):
    model, watch = seeded(Configured, form=form), Watch()
    dense = {id(parameter): name for name, parameter in model.named_parameters()}
    trainer = fit(model, BATCHES, [in_steps(), watch], max_epochs=3, gradient_clip_val=0.5)
    for ids in watch.parameters[: END + 1]:
        assert [dense[one].endswith("weight") for one in ids] == [True] * 4 + [False] * 4
    groups = trainer.optimizers[0].param_groups
    present = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for group in groups for parameter in group["params"]} == present
    assert [group["weight_decay"] for group in groups] == [5.0, 0.0]
    for group in groups:
        for parameter in group["params"]:
            assert trainer.optimizers[0].state[parameter]["exp_avg"].shape == parameter.shape


def test_state_dicts_are_those_of_the_dense_module():
    model, watch = seeded(), Watch()
    names = list(model.state_dict())
    fit(model, BATCHES, [in_steps(), watch], max_epochs=3)
    assert all(sorted(seen) == sorted(names) for seen in watch.names[: END + 1])
    assert sorted(watch.names[-1]) == sorted(model.state_dict())


class Reload(Callback):
    """Loads the module's own state dict in the middle of the choice."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 7:
            pl_module.load_state_dict(pl_module.state_dict())


def test_loads_its_own_state_dict_while_it_chooses():
    models = [seeded(), seeded()]
    fit(models[0], BATCHES, [in_steps()], max_epochs=3)
    fit(models[1], BATCHES, [in_steps(), Reload()], max_epochs=3)
    assert_same(*models, rtol=0, atol=0)


def fitted(callback: Any, **settings: Any) -> Any:
    model = seeded()
    fit(model, BATCHES, [callback], **{"max_epochs": 3, **settings})
    return model


def test_an_interrupted_training_leaves_the_dense_module():
    class Stop(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 7:
                raise RuntimeError("stop here")

    model = seeded()
    before = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    with pytest.raises(RuntimeError, match="stop here"):
        fit(model, BATCHES, [in_steps(), Stop()], max_epochs=3)
    assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == before
    hooks = (model._load_state_dict_pre_hooks, model._state_dict_hooks)
    assert not any(hooks)
    assert type(model.backbone[0]) is nn.Linear


def test_keeps_what_it_is_told_to():
    callback = in_steps(layers="backbone.*", keep="backbone.2", multiple_of=4, min_size=2)
    model = fitted(callback)
    report = callback.report
    assert "backbone.2" not in report.ranks
    assert set(report.kept) == {"backbone.0", "backbone.4"}
    assert all(left % 4 == 0 or left == of for left, of in report.kept.values())
    assert model.backbone[2].in_features == report.kept["backbone.0"].left
    assert params(model) == report.after.params <= 0.5 * report.before.params


def test_a_schedule_says_how_far_the_choice_is():
    watch = Watch()
    model = seeded()
    schedule = Cosine(0.0, 1.0, begin=BEGIN, until=END, unit="steps")
    fit(model, BATCHES, [in_steps(schedule=schedule), watch], max_epochs=3)
    assert params(model) <= 0.5 * 399
    still = Watch()
    with pytest.warns(UserWarning, match="training ended before `end="):
        fit(seeded(), BATCHES, [in_steps(schedule=Constant(0.0)), still], max_epochs=2, limit_train_batches=5)
    assert min(metrics["budget/params"] for metrics in still.metrics[BEGIN + 1 :]) > 0.7


@pytest.mark.parametrize(
    "settings",
    [
        {"fast_dev_run": True, "validation": Batches(BATCHES)},
        {"max_epochs": -1, "max_steps": 9},
        {"max_epochs": 2, "validation": Batches(BATCHES[:2]), "num_sanity_val_steps": 2},
    ],
    ids=["fast_dev_run", "without epochs", "validated"],
)
def test_kinds_of_training(settings):
    model, callback = seeded(), HybridCompression("*", 0.4, "flops")
    fit(model, BATCHES, [callback], **settings)
    assert callback.finished
    assert callback.report.after.flops <= 0.4 * callback.report.before.flops


def test_the_record_has_the_way_and_the_end():
    callback = in_steps()
    fitted(callback)
    rows = callback._record.rows
    assert [row["step"] for row in rows] == [*range(1, STEPS - 5), 12]
    assert rows[-1]["share"] == callback.report.share
