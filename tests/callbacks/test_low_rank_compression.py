import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    Callback,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics import MeanMetric

from lightning_plugins.callbacks import LowRankCompression, SearchSettings, Timing
from lightning_plugins.compression import (
    BeamOptions,
    beam_search,
    energy_threshold,
    equal_ratio,
    factorize,
    low_rank_layer,
    trade_off,
)
from tests.callbacks.low_rank import BATCHES, RANKS, Model, assert_same, in_steps, seeded
from tests.models import Batches, fit


def tail_over_head(weight: Tensor, rank: int) -> Tensor:
    values = torch.linalg.svdvals(weight)
    return values[rank:].sum() / values[:rank].sum()


def by_hand(steps: int, *, split_at: int) -> Model:
    """A plain loop with a term that autograd differentiates and momentum that is carried over by the formula."""
    model = seeded().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        if step == split_at:
            buffers = {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}
            for name, rank in RANKS.items():
                factors = low_rank_layer(model.get_submodule(name), rank)
                A, B = (part.weight.detach() for part in factors)
                moment = buffers.pop(f"{name}.weight")
                buffers[f"{name}.0.weight"], buffers[f"{name}.1.weight"] = B.T @ moment, moment @ A.T
                buffers[f"{name}.1.bias"] = buffers.pop(f"{name}.bias")
                model.set_submodule(name, factors)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            for name, parameter in model.named_parameters():
                optimizer.state[parameter]["momentum_buffer"] = buffers[name]
        loss = model.loss([part.double() if part.is_floating_point() else part for part in BATCHES[step % 6]])
        if 3 <= step < split_at:
            loss = loss + 0.3 * sum(tail_over_head(model.get_submodule(n).weight, r) for n, r in RANKS.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_trains_like_a_loop_written_by_hand():
    model = seeded().double()
    fit(model, BATCHES, [in_steps(ranks=RANKS)], max_epochs=3)
    assert_same(model, by_hand(18, split_at=12))
    assert type(model.backbone[0]) is nn.Sequential


class AtTheSplit(LowRankCompression):
    """Looks at the network right before and after."""

    def _split(self, trainer: Trainer, pl_module: Any, *, last: bool) -> None:
        self.dense = copy.deepcopy(pl_module)
        super()._split(trainer, pl_module, last=last)
        self.small = copy.deepcopy(pl_module)
        self.step = trainer.global_step


def test_the_small_network_is_the_truncated_one():
    model = seeded()
    callback = AtTheSplit("*", budget=0.7, penalty=0.1, search=SearchSettings(data=BATCHES[:2]), figures=False)
    trainer = fit(model, BATCHES, [callback], max_epochs=3)
    x = BATCHES[0][0].double()
    truncated = factorize(copy.deepcopy(callback.dense), callback.found)
    torch.testing.assert_close(callback.small(x), truncated(x))
    assert callback.step == 18  # 0.8 of 18 steps lies in the last epoch: the split is its end
    params = sum(p.numel() for p in model.parameters())
    counter = FlopCounterMode(display=False)
    with counter:
        model(model.example_input_array.double())
    before, after = callback.report.before, callback.report.after
    assert (before.params, before.flops) == (119, 1648)
    assert (after.params, after.flops) == (params, counter.get_total_flops())
    changed = {name for name, change in callback.report.layers.items() if change.before != change.after}
    assert changed == {name for name in callback.found if type(model.get_submodule(name)) is nn.Sequential}
    assert 1 - sum(w.numel() for n, w in model.named_parameters() if "weight" in n) / 103 >= 0.3
    assert trainer.callback_metrics["budget/params"] == 1  # up to the last step it was dense


def test_without_an_example_input_parameters_are_counted_alone():
    model, callback = seeded(), in_steps(ranks=RANKS)
    model.example_input_array = None
    fit(model, BATCHES, [callback], max_epochs=3)
    assert callback.report.before.params == 119
    assert callback.report.after.params == sum(p.numel() for p in model.parameters())
    assert callback.report.flops_ratio is None
    again = in_steps(ranks=RANKS)
    again.load_state_dict(callback.state_dict())
    assert again.report == callback.report


@pytest.mark.parametrize(
    ("figures", "installed", "stops"),
    [(True, True, False), (True, True, True), (True, False, False), (False, True, False)],
    ids=["drawn", "drawn when stopped", "without matplotlib", "not wanted"],
)
def test_the_report_is_drawn_if_it_can_be(figures, installed, stops, tmp_path, monkeypatch):
    if not installed:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    callback = in_steps(factorize_at=4, ranks=RANKS, figures=figures)
    fit(seeded(), BATCHES, [callback, *([Stops()] if stops else [])], max_epochs=2, logger=CSVLogger(tmp_path))
    assert callback.finished
    drawn = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.png")]
    assert drawn == ([Path("lightning_logs/version_0/compression.png")] if figures and installed else [])


SEARCHES = {"equal_ratio": equal_ratio, "energy": energy_threshold, "trade_off": trade_off}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("cost", ["params", "flops"])
def test_searches_of_weights(search, cost):
    callback = in_steps(search_at=0, method=search, cost=cost, budget=0.6)
    expected = seeded().double()
    inputs = {"inputs": expected.example_input_array.double()} if cost == "flops" else {}
    wanted = SEARCHES[search](expected, budget=0.6, cost=cost, **inputs)
    model = seeded()
    trainer = fit(model, BATCHES, [callback], max_epochs=4)
    assert callback.found == wanted.ranks
    small, dense = getattr(callback.report.after, cost), getattr(callback.report.before, cost)
    logged = trainer.callback_metrics[f"budget/{cost}"].item()
    assert logged == pytest.approx(small / dense)
    assert (logged > wanted.share + 0.01) == (cost == "params")  # the network has biases, the layers' weights none
    assert {name: int(trainer.callback_metrics[f"rank/{name}"]) for name in wanted.ranks} == wanted.ranks


def negative_loss(model: Any, batch: Any) -> Tensor:
    return -model.loss(batch)


def own_accuracy(model: Any, batch: Any) -> Any:
    return model.accuracy(batch)


@pytest.mark.parametrize(
    ("score", "function"),
    [(None, negative_loss), (negative_loss, negative_loss), ("accuracy", own_accuracy)],
    ids=["default", "function", "method"],
)
@pytest.mark.parametrize("data", [BATCHES[:2], "held_out", Batches(BATCHES)], ids=["batches", "method", "loader"])
def test_beam_search_scores_what_it_is_told(score, function, data):
    options = {"data": data, "batches": 3, "options": {"step": 1}}
    callback = in_steps(search_at=0, factorize_at=None, score=score, **options)
    batches = {str: BATCHES[4:], list: BATCHES[:2], Batches: BATCHES[:3]}[type(data)]
    doubled = [(x.double(), y) for x, y in batches]
    wanted = beam_search(seeded().double(), doubled, function, budget=0.7, options=BeamOptions(step=1))
    fit(seeded(), BATCHES, [callback], max_epochs=1, max_steps=1)
    assert callback.found == wanted.ranks


class Noisy(Model):
    """Has what a search could disturb: statistics, random numbers, metrics and logs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone.insert(1, nn.BatchNorm1d(8))
        self.backbone.append(nn.Dropout(0.5))
        self.seen = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.seen.update(loss.detach())
        self.log("seen", self.seen, on_epoch=True, on_step=False)
        self.log("mean" if self.training else "mean of a search", loss.detach(), on_epoch=True, on_step=False)
        return {"loss": loss}


def shuffled() -> DataLoader:
    x, y = (torch.cat(parts) for parts in zip(*BATCHES, strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)


def test_the_training_does_not_notice_the_search():
    models, metrics = [], []
    for callbacks in ([in_steps(search_at=8, weight=0.0, factorize_at=None, data=None)], []):
        model = seeded(Noisy)
        metrics.append(fit_loader(model, shuffled(), callbacks).callback_metrics)
        models.append(model)
    assert_same(*models, rtol=0, atol=0)
    torch.testing.assert_close({name: metrics[0][name] for name in metrics[1]}, metrics[1], rtol=0, atol=0)
    assert set(metrics[1]) == {"seen", "mean"}
    assert {name.partition("/")[0] for name in metrics[0]} == {"seen", "mean", "budget", "rank"}


def fit_loader(model: Any, loader: Any, callbacks: Any) -> Trainer:
    settings = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=2, callbacks=callbacks, accelerator="cpu", enable_progress_bar=False, **settings)
    trainer.fit(model, loader)
    return trainer


def test_by_default_the_first_training_data_in_order_are_scored():
    seen = []

    def score(model: Any, batch: Any) -> Tensor:
        seen.append(batch)
        return -model.loss(batch)

    callback = in_steps(search_at=0, data=None, batches=2, score=score)
    fit_loader(seeded(), shuffled(), [callback])
    first, *seen = seen  # tried at the start of the training
    torch.testing.assert_close(
        [tuple(batch) for batch in (first, *seen[:2])], [BATCHES[0], *BATCHES[:2]], rtol=0, atol=0
    )
    assert sum(torch.equal(x, BATCHES[2][0]) for x, _ in seen) == 0


def test_regularisation_alone():
    model, dense = seeded(), seeded()
    fit(model, BATCHES, [in_steps(factorize_at=None, ranks=RANKS)], max_epochs=4)
    fit(dense, BATCHES, max_epochs=4)
    assert list(model.state_dict()) == list(dense.state_dict())
    for name, rank in RANKS.items():
        tails = [tail_over_head(m.get_submodule(name).weight.detach(), rank) for m in (model, dense)]
        assert tails[0] < 0.3 * tails[1]


def test_splitting_alone_at_the_start():
    model, expected = seeded(), factorize(seeded().double(), RANKS)
    fit(model, BATCHES, [in_steps(search_at=0, factorize_at=0, weight=0.0, ranks=RANKS)])
    fit(expected, BATCHES)
    assert_same(model, expected)


@pytest.mark.parametrize(
    ("settings", "epochs", "split"),
    [
        ({"unit": "epochs", "search_at": 0.5, "factorize_at": 1.5}, 4, 12),
        ({"unit": "epochs", "search_at": 1, "factorize_at": 1}, 4, 6),
        ({"unit": "fraction", "search_at": 0.25, "factorize_at": 0.5}, 4, 12),
        ({"unit": "fraction", "search_at": 1.0, "factorize_at": 1.0}, 2, 12),
        ({"unit": "steps", "search_at": 6, "factorize_at": 7}, 4, 12),
        ({"unit": "steps", "search_at": 0, "factorize_at": 23}, 4, 24),
    ],
    ids=str,
)
def test_when_layers_are_split(settings, epochs, split):
    callback = AtTheSplit(
        "*", budget=0.7, penalty=0.1, search=SearchSettings(data=BATCHES[:2]), figures=False, timing=Timing(**settings)
    )
    fit(seeded(), BATCHES, [callback], max_epochs=epochs)
    assert callback.step == split


def test_the_last_checkpoint_holds_the_small_network(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    model = seeded()
    fit(model, BATCHES, [in_steps(factorize_at=12), saving], enable_checkpointing=True)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == list(model.state_dict())
    assert "backbone.0.1.weight" in saved["state_dict"]


class Stops(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 5


@pytest.mark.parametrize("factorize_at", [4, 9])
def test_a_training_that_is_stopped(factorize_at):
    model, callback = seeded(), in_steps(factorize_at=factorize_at)
    if factorize_at == 4:
        fit(model, BATCHES, [callback, Stops()], max_epochs=9)
    else:
        with pytest.warns(UserWarning, match="ended before `factorize_at=9` \\(steps\\), so no layer was split"):
            fit(model, BATCHES, [callback, Stops()], max_epochs=9)
    assert callback.finished == (factorize_at == 4)
    assert (type(model.backbone[0]) is nn.Sequential) == callback.finished


@pytest.mark.parametrize(
    "settings",
    [
        {"fast_dev_run": True, "validation": Batches(BATCHES)},
        {"max_epochs": -1, "max_steps": 9},
        {"max_epochs": 5, "validation": Batches(BATCHES[:2]), "num_sanity_val_steps": 2},
    ],
    ids=["fast_dev_run", "without epochs", "validated"],
)
def test_kinds_of_training(settings):
    model, callback = (
        seeded(),
        LowRankCompression("*", budget=0.7, penalty=0.1, search=SearchSettings(data=BATCHES[:2]), figures=False),
    )
    fit(model, BATCHES, [callback], **settings)
    assert callback.finished
    assert type(model.backbone[0]) is nn.Sequential
