"""The compression under many settings of the Trainer, the module and the optimizer."""

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_plugins.callbacks import LowRankCompression
from tests._processes import run_on_ranks
from tests.callbacks.low_rank import BATCHES, RANKS, Model, assert_same, in_steps, nested, seeded
from tests.contract_ranks import BOUNDS, act_as_rank
from tests.models import fit, shard


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
    callback, model = in_steps(scheme=scheme, budget=0.5), seeded(Images)
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
    models, callbacks = [seeded(), seeded()], [in_steps(), in_steps()]
    fit(torch.compile(models[0], backend="aot_eager"), BATCHES, callbacks[:1], max_epochs=3)
    fit(models[1], BATCHES, callbacks[1:], max_epochs=3)
    assert callbacks[0].found == callbacks[1].found
    assert_same(*models)


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


def test_state_key_tells_layers_apart_and_nothing_else():
    base = {"layers": "a", "search_at": 0.2}
    changes: list[dict[str, Any]] = [
        {"budget": 0.5},
        {"weight": 0.5},
        {"method": "energy"},
        {"options": {"width": 2}},
        {"ranks": {"a": 2}},
        {"cost": "flops"},
        {"p": 2},
        {"scheme": 2},
        {"search_at": 0.3},
        {"factorize_at": None},
        {"unit": "epochs"},
        {"every_n_steps": 2},
    ]
    keys = [LowRankCompression(**nested({**base, **change})).state_key for change in [{}, *changes]]
    assert len(set(keys)) == 1  # a training is resumed with other settings, and not compressed twice for it
    assert keys[0] != LowRankCompression(**nested({**base, "layers": "b"})).state_key


class Normed(Model):
    """Its running statistics differ between ranks until the next forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone.insert(1, nn.BatchNorm1d(8))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) * self.trainer.world_size


def negative_loss(model: Any, batch: Any) -> Tensor:
    model.statistics = model.backbone[1].running_mean.clone()
    return -model.loss(batch)


def on_ranks(rank: int, world_size: int) -> dict[str, Any]:
    act_as_rank(rank, world_size)
    mine, results = shard(BATCHES, BOUNDS[world_size]), {}
    settings = {"strategy": "ddp", "devices": world_size, "max_epochs": 3}
    for name, callbacks in {
        "searched": [in_steps(weight=0.0, factorize_at=None, score=negative_loss)],
        "plain": [],
        "compressed": [in_steps(score="accuracy", options={"step": 1, "bounds": [0, 1]})],
    }.items():
        model = seeded(Normed)
        fit(model, mine, callbacks, **settings)
        results[name] = dict(model.state_dict())
        results[f"{name}, found"] = callbacks[0].found if callbacks else None
        results[f"{name}, statistics"] = getattr(model, "statistics", None)
    return results


@pytest.mark.distributed
def test_ranks_find_the_same_and_their_training_does_not_notice(tmp_path):
    ranks = run_on_ranks(on_ranks, 2, tmp_path, 2)
    for results in ranks:
        torch.testing.assert_close(results["searched"], results["plain"], rtol=0, atol=0)
        assert results["searched, found"] == ranks[0]["searched, found"]
        assert results["compressed, found"] == ranks[0]["compressed, found"]
    torch.testing.assert_close(*(r["searched, statistics"] for r in ranks), rtol=0, atol=0)  # while it searched
    statistics = "backbone.1.running_mean"
    assert not torch.equal(ranks[0]["plain"][statistics], ranks[1]["plain"][statistics])  # so there was a difference
    weights = [{n: v for n, v in r["compressed"].items() if "running" not in n} for r in ranks]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    assert "backbone.0.0.weight" in weights[0]
