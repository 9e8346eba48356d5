import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    ModelCheckpoint,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics import MeanMetric

from lightning_plugins.callbacks import LowRankCompression
from lightning_plugins.compression import (
    beam_search,
    energy_threshold,
    equal_ratio,
    factorize,
    low_rank_layer,
    trade_off,
)
from tests.models import Batches, Classifier, fit, make_batches

BATCHES = make_batches(6)
RANKS = {"backbone.0": 2, "backbone.2": 1}


class Model(Classifier):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(lr=0.05, **arguments)
        self.example_input_array = BATCHES[0][0].float()

    def accuracy(self, batch: Any) -> tuple[Tensor, int]:
        return (self(batch[0]).argmax(1) == batch[1]).sum(), len(batch[1])

    def held_out(self) -> Any:
        return BATCHES[4:]


def seeded(kind: Any = Model, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return kind(**arguments)


def in_steps(search_at: float = 3, factorize_at: float | None = 9, **settings: Any) -> LowRankCompression:
    """Searches before step 3, and splits at the start of the third of epochs of six steps."""
    return LowRankCompression(
        **{
            "layers": "*",
            "ratio": 0.3,
            "weight": 0.3,
            "search_data": BATCHES[:2],
            "unit": "steps",
            "search_at": search_at,
            "factorize_at": factorize_at,
            **settings,
        }
    )


def assert_same(model: nn.Module, expected: nn.Module, **tolerance: float) -> None:
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), **tolerance)


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

    def _split(self, trainer: Trainer, pl_module: Any) -> None:
        self.dense = copy.deepcopy(pl_module)
        super()._split(trainer, pl_module)
        self.small = copy.deepcopy(pl_module)
        self.step = trainer.global_step


def test_the_small_network_is_the_truncated_one():
    model = seeded()
    callback = AtTheSplit("*", 0.3, 0.1, search_data=BATCHES[:2])
    trainer = fit(model, BATCHES, [callback], max_epochs=3)
    x = BATCHES[0][0].double()
    truncated = factorize(copy.deepcopy(callback.dense), callback.found)
    torch.testing.assert_close(callback.small(x), truncated(x))
    assert callback.step == 18  # 0.8 of 18 steps lies in the last epoch: the split is its end
    params = sum(p.numel() for p in model.parameters())
    counter = FlopCounterMode(display=False)
    with counter:
        model(model.example_input_array.double())
    assert callback.report["after"] == {"params": params, "flops": counter.get_total_flops()}
    assert callback.report["before"] == {"params": 119, "flops": 1648}
    for kind, total in (("params", 119 - params), ("flops", 1648 - counter.get_total_flops())):
        pairs = [layer[kind] for layer in callback.report["layers"].values()]
        assert sum(before - after for before, after in pairs) == total
    assert 1 - sum(w.numel() for n, w in model.named_parameters() if "weight" in n) / 103 >= 0.3
    assert trainer.callback_metrics["budget/params"] == 1  # up to the last step it was dense


SEARCHES = {"equal_ratio": equal_ratio, "energy": energy_threshold, "trade_off": trade_off}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("cost", ["params", "flops"])
def test_searches_of_weights(search, cost):
    callback = in_steps(search_at=0, search=search, cost=cost, ratio=0.4)
    expected = seeded().double()
    inputs = {"inputs": expected.example_input_array.double()} if cost == "flops" else {}
    wanted = SEARCHES[search](expected, ratio=0.4, cost=cost, **inputs)
    trainer = fit(seeded(), BATCHES, [callback], max_epochs=4)
    assert callback.found == wanted.ranks
    assert trainer.callback_metrics[f"budget/{cost}"].item() == pytest.approx(1 - wanted.ratio)
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
    options = {"search_data": data, "search_batches": 3, "search_options": {"step": 1}}
    callback = in_steps(search_at=0, factorize_at=None, score=score, **options)
    batches = {str: BATCHES[4:], list: BATCHES[:2], Batches: BATCHES[:3]}[type(data)]
    doubled = [(x.double(), y) for x, y in batches]
    wanted = beam_search(seeded().double(), doubled, function, ratio=0.3, step=1)
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
        self.log("seen", self.seen(loss.detach()), on_epoch=True, on_step=False)
        self.log("mean", loss.detach(), on_epoch=True, on_step=False)
        return {"loss": loss}


def shuffled() -> DataLoader:
    x, y = (torch.cat(parts) for parts in zip(*BATCHES, strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)


def test_the_training_does_not_notice_the_search():
    models, metrics = [], []
    for callbacks in ([in_steps(weight=0.0, factorize_at=None, search_data=None)], []):
        model = seeded(Noisy)
        metrics.append(fit_loader(model, shuffled(), callbacks).callback_metrics)
        models.append(model)
    assert_same(*models, rtol=0, atol=0)
    torch.testing.assert_close({name: metrics[0][name] for name in metrics[1]}, metrics[1], rtol=0, atol=0)
    assert set(metrics[1]) == {"seen", "mean"}


def fit_loader(model: Any, loader: Any, callbacks: Any) -> Trainer:
    settings = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=2, callbacks=callbacks, accelerator="cpu", enable_progress_bar=False, **settings)
    trainer.fit(model, loader)
    return trainer


def test_by_default_the_first_training_data_in_order_are_scored():
    callback = in_steps(search_at=0, search_data=None, search_batches=2, search_options={"step": 1})
    fit_loader(seeded(), shuffled(), [callback])
    wanted = beam_search(seeded(), BATCHES[:2], negative_loss, ratio=0.3, step=1)
    assert callback.found == wanted.ranks


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
    callback = AtTheSplit("*", 0.3, 0.1, search_data=BATCHES[:2], **settings)
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
    model, callback = seeded(), LowRankCompression("*", 0.3, 0.1, search_data=BATCHES[:2])
    fit(model, BATCHES, [callback], **settings)
    assert callback.finished
    assert type(model.backbone[0]) is nn.Sequential


def test_fits_twice_and_then_another_model():
    callback, model, expected = in_steps(), seeded(), seeded()
    fit(model, BATCHES, [callback], max_epochs=3)
    fit(expected, BATCHES, [in_steps()], max_epochs=3)
    first = dict(callback.found)
    fit(model, BATCHES, [callback], max_epochs=3)  # the same module is trained on
    assert callback.found == first
    fit(expected, BATCHES, max_epochs=3)
    assert_same(model, expected, rtol=0, atol=0)
    other, anew = seeded(width=7), seeded(width=7)
    fit(other, BATCHES, [callback], max_epochs=3)
    fit(anew, BATCHES, [in_steps()], max_epochs=3)
    assert_same(other, anew, rtol=0, atol=0)
    assert type(other.backbone[2]) is nn.Sequential


class Images(Model):
    """Convolutions with norms between them, and an optimizer with groups."""

    def __init__(self, scheme: int = 1) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Unflatten(1, (1, 3, 2)),
            nn.Conv2d(1, 8, (3, 2), padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 1, groups=8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(8, 3)

    def configure_optimizers(self) -> Any:
        plain = [p for p in self.parameters() if p.ndim < 2]
        groups = [{"params": [p for p in self.parameters() if p.ndim > 1]}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4), "interval": "step"}]


@pytest.mark.parametrize("scheme", [1, 2])
def test_convolutions(scheme):
    callback, model = in_steps(scheme=scheme, ratio=0.5), seeded(Images)
    trainer = fit(model, BATCHES, [callback], max_epochs=3)
    assert type(model.backbone[4]) is nn.Sequential
    kernels = [part.kernel_size for part in model.backbone[4]]
    assert kernels == ([(3, 3), (1, 1)] if scheme == 1 else [(1, 3), (3, 1)])
    assert type(model.backbone[6]) is nn.Conv2d  # grouped, so a glob passes over it
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [
        sum(p.ndim > 1 for p in model.parameters()),
        sum(p.ndim < 2 for p in model.parameters()),
    ]
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * 0.1**4)
    assert all(p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_fp16_scaler(fused):
    def train(**settings: Any) -> Model:
        model = seeded()
        model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=fused)
        fit(model, BATCHES, [in_steps(ranks=RANKS)], max_epochs=3, **settings)
        return model

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    model = train(plugins=MixedPrecision("16-mixed", "cpu", scaler), precision=None)
    assert scaler.get_scale() == 2.0**12  # no step was left out
    dense = {name: value.float() for name, value in functional(train(precision="32-true")).items()}
    torch.testing.assert_close(functional(model), dense, rtol=0.02, atol=0.02)


def functional(model: Model) -> dict[str, Tensor]:
    """The weights that factors stand for: the sign of a singular vector is arbitrary."""
    return {n: model.get_submodule(n)[1].weight.detach() @ model.get_submodule(n)[0].weight.detach() for n in RANKS}


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_bfloat16(precision):
    model, callback = seeded(), in_steps()
    fit(model, BATCHES, [callback], max_epochs=3, precision=precision)
    assert callback.finished
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


def test_accumulated_and_clipped():
    twice = [batch for batch in BATCHES for _ in range(2)]
    model, expected = seeded(), seeded()
    settings = {"max_epochs": 3, "gradient_clip_val": 0.2}
    fit(model, twice, [in_steps(ranks=RANKS)], accumulate_grad_batches=2, **settings)
    fit(expected, BATCHES, [in_steps(ranks=RANKS)], **settings)
    assert_same(model, expected)


def test_accumulation_that_changes():
    model, callback = seeded(), in_steps()
    fit(model, BATCHES, [callback, GradientAccumulationScheduler({0: 1, 2: 3})], max_epochs=4)
    assert callback.finished


def test_compiled():
    model, expected = seeded(), seeded()
    fit(torch.compile(model, backend="aot_eager"), BATCHES, [in_steps(ranks=RANKS)], max_epochs=3)
    fit(expected, BATCHES, [in_steps(ranks=RANKS)], max_epochs=3)
    assert_same(model, expected)


def test_a_shared_layer_is_split_once():
    class Shared(Model):
        def __init__(self) -> None:
            super().__init__(width=8)
            self.backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
            self.backbone.append(self.backbone[2])

    model = seeded(Shared)
    trainer = fit(model, BATCHES, [in_steps(ranks={"backbone.2": 2})], max_epochs=3)
    assert model.backbone[4] is model.backbone[2]
    assert type(model.backbone[2]) is nn.Sequential
    assert len(trainer.optimizers[0].param_groups[0]["params"]) == len(list(model.parameters()))


class Fails(Model):
    def on_train_epoch_end(self) -> None:
        raise KeyError("the user's own error")


@pytest.mark.parametrize("kind", [Model, Fails])
def test_nothing_but_the_layers_is_changed(kind):
    model, plain, callback = seeded(kind), seeded(kind), in_steps(search_at=2, factorize_at=4)
    for trained, callbacks in ((plain, []), (model, [callback])):
        if kind is Fails:
            with pytest.raises(KeyError, match="the user's own error"):
                fit(trained, BATCHES, callbacks)
        else:
            fit(trained, BATCHES, callbacks)
    split = set() if kind is Fails else {n for n in callback.found if type(model.get_submodule(n)) is nn.Sequential}
    assert bool(split) != (kind is Fails)
    for name, module in plain.named_modules():
        if name not in split:
            assert sorted(vars(model.get_submodule(name))) == sorted(vars(module))
            for key, value in vars(module).items():
                if key.endswith("_hooks"):
                    assert len(getattr(model.get_submodule(name), key)) == len(value)


def test_state_key_tells_instances_apart():
    base = {"layers": "a", "search_at": 0.2}
    changes: list[dict[str, Any]] = [
        {"layers": "b"},
        {"ratio": 0.5},
        {"weight": 0.5},
        {"search": "energy"},
        {"search_options": {"width": 2}},
        {"ranks": {"a": 2}},
        {"cost": "flops"},
        {"p": 2},
        {"scheme": 2},
        {"search_at": 0.3},
        {"factorize_at": None},
        {"unit": "epochs"},
        {"every_n_steps": 2},
    ]
    keys = [LowRankCompression(**{**base, **change}).state_key for change in [{}, *changes]]
    assert len(set(keys)) == len(keys)
    assert keys[0] == LowRankCompression(**base).state_key
