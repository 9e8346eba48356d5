import math
import os
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_plugins.callbacks import stable_rank
from lightning_plugins.callbacks.stable_rank import StableRankRegularization
from lightning_plugins.distributed import full_tensor
from lightning_plugins.functional.stable_rank import exact_gradient
from lightning_plugins.schedules import Linear, Piecewise
from tests._processes import run_on_ranks
from tests._waits import Waits
from tests.models import Batches, Classifier, fit, make_batches, shard

BATCHES = make_batches(6)
WEIGHT = 0.3


class Model(Classifier):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(lr=0.05, **arguments)


def by_definition(matrix: Tensor, rank: int | None, p: int) -> Tensor:
    s = torch.linalg.svdvals(matrix)
    return (s**2).sum() / s[0] ** 2 if rank is None else (s[rank:] ** p).sum() / (s[:rank] ** p).sum()


class ByHand(Model):
    """The term as part of the loss, through autograd of singular values."""

    def __init__(self, rank: int | None = 2, p: int = 1, layers: Any = ("backbone.0", "backbone.2", "head"), **a: Any):
        super().__init__(**a)
        self.rank, self.p, self.layers = rank, p, layers
        self.strength = lambda step: WEIGHT

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        terms = [by_definition(self.get_submodule(name).weight, self.rank, self.p) for name in self.layers]
        return self.loss(batch) + self.strength(self.global_step) * sum(terms)


def seeded(kind: Any, *arguments: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    return kind(*arguments, **settings)


def assert_same(model: nn.Module, expected: nn.Module, **tolerance: float) -> None:
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), **tolerance)


def assert_different(model: nn.Module, other: nn.Module) -> None:
    differences = [(a - b).abs().max() for a, b in zip(model.parameters(), other.parameters(), strict=True)]
    assert max(differences) > 1e-3


@pytest.fixture(params=["each weight", "batches"])
def tolerance(request, monkeypatch):
    """Both ways to compute the terms, of which an accelerator takes the second; returns how close to exact they are."""
    if request.param == "each weight":
        return {}
    monkeypatch.setattr(stable_rank, "in_batches", lambda weight: True)
    return {"rtol": 1e-2, "atol": 1e-3}


FORMS = {"stable rank": {"rank": None}, "p=1": {"rank": 2}, "p=2": {"rank": 2, "p": 2}}
TRAINERS = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 2},
    "clipped by norm": {"gradient_clip_val": 0.1},
    "clipped by value": {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
    "without epochs": {"max_epochs": -1, "max_steps": 9},
    "fast": {"fast_dev_run": True, "validation": Batches(BATCHES)},
}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("form", FORMS)
def test_trains_like_the_term_written_by_hand(form, trainer, tolerance):
    model, expected, plain = seeded(Model), seeded(ByHand, **FORMS[form]), seeded(Model)
    fit(model, BATCHES, [StableRankRegularization("*", WEIGHT, **FORMS[form])], **TRAINERS[trainer])
    fit(expected, BATCHES, **TRAINERS[trainer])
    fit(plain, BATCHES, **TRAINERS[trainer])
    assert_same(model, expected, **tolerance)
    assert_different(model, plain)


def test_fits_twice_and_then_another_model():
    callback = StableRankRegularization("*", WEIGHT, rank=2)
    for width in (5, 7):
        model, expected = seeded(Model, width=width), seeded(ByHand, width=width)
        for _ in range(2):
            fit(model, BATCHES, [callback])
            fit(expected, BATCHES)
        assert_same(model, expected)


@pytest.mark.parametrize("fused", [False, True])
def test_fp16_scaler(fused, tolerance):
    def train(model: Model) -> Model:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        callbacks = [] if isinstance(model, ByHand) else [StableRankRegularization("*", WEIGHT, rank=2)]
        model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=fused)
        fit(model, BATCHES, callbacks, plugins=plugin, precision=None)
        assert scaler.get_scale() == 2.0**12  # no step was left out
        return model

    model, expected = train(seeded(Model)), train(seeded(ByHand))
    assert_same(
        model, expected, **{"rtol": 1e-3, "atol": 1e-3, **tolerance}
    )  # a term scaled wrongly is off by more than a third


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_bfloat16(precision, tolerance):
    model, plain = seeded(Model), seeded(Model)
    fit(model, BATCHES, [StableRankRegularization("*", WEIGHT, rank=2)], precision=precision)
    fit(plain, BATCHES, precision=precision)
    assert_different(model, plain)
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


def test_every_second_step_is_twice_as_strong():
    model, expected = seeded(Model), seeded(ByHand)
    expected.strength = lambda step: 0.0 if step % 2 else 2 * WEIGHT
    fit(model, BATCHES, [StableRankRegularization("*", WEIGHT, rank=2, every_n_steps=2)])
    fit(expected, BATCHES)
    assert_same(model, expected)


def test_schedule():
    model, expected = seeded(Model), seeded(ByHand)
    expected.strength = lambda step: WEIGHT * min(max((step - 1) / 5, 0.0), 1.0)
    schedule = Linear(0.0, 1.0, begin=1, until=6, unit="steps")
    fit(model, BATCHES, [StableRankRegularization("*", WEIGHT, rank=2, schedule=schedule)])
    fit(expected, BATCHES)
    assert_same(model, expected)


def test_several_instances_add_up():
    model, expected = seeded(Model), seeded(ByHand)
    callbacks = [StableRankRegularization(name, WEIGHT, rank=2) for name in ("backbone.*", "head")]
    fit(model, BATCHES, callbacks)
    fit(expected, BATCHES)
    assert_same(model, expected)


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (0.5, {"backbone.0": 3, "backbone.2": 2, "head": 2}),
        (4, {"backbone.0": 4, "backbone.2": 4}),
        ({"backbone.0": 6, "backbone.2": 1, "head": 2}, {"backbone.2": 1, "head": 2}),
    ],
    ids=["fraction", "number", "mapping"],
)
def test_ranks(rank, expected):
    seen = {}

    class Looks(StableRankRegularization):
        def on_train_start(self, *_: Any) -> None:
            seen.update(self._ranks)

    fit(seeded(Model), BATCHES[:1], [Looks("*", WEIGHT, rank=rank)], max_epochs=1)
    assert seen == expected


class Wide(Classifier):
    """Layers large enough that singular vectors are followed."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(features=40, width=48, lr=0.003, **arguments)
        self.backbone[0], self.backbone[2] = nn.Linear(40, 60), nn.Linear(60, 48)


WIDE = make_batches(6, features=40)


class Compares(StableRankRegularization):
    """Keeps how far the gradient that is added is from the exact one."""

    def on_fit_start(self, *arguments: Any) -> None:
        super().on_fit_start(*arguments)
        self.errors: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        weights = [pl_module.backbone[0].weight, pl_module.backbone[2].weight]
        before = [weight.grad.clone() for weight in weights]
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        rank, p = (1, 2) if self.rank is None else (self.rank, self.p)
        for weight, grad in zip(weights, before, strict=True):
            exact = self.weight * exact_gradient(weight.detach(), rank, p).gradient
            self.errors.append(float((weight.grad - grad - exact).norm() / exact.norm()))


@pytest.mark.parametrize("form", [{"rank": None}, {"rank": 5, "p": 2}, {"rank": 12, "p": 2}], ids=str)
def test_followed_gradient_is_within_a_percent_of_the_exact_one(form, tolerance):
    callback = Compares("backbone.*", 0.01, **form)
    fit(seeded(Wide), WIDE, [callback], max_epochs=5)
    assert callback._starts  # some layer's vectors are followed
    assert len(callback.errors) == 60
    assert max(callback.errors) < 0.01


@pytest.mark.parametrize("rank", [5, 12])
def test_gradient_by_products_is_within_a_percent_of_the_exact_one(rank, monkeypatch):
    monkeypatch.setattr(stable_rank, "in_batches", lambda weight: True)
    monkeypatch.setattr(stable_rank, "exact_gradient", None)  # nothing is decomposed but to begin with
    callback = Compares("backbone.*", 0.01, rank=rank)
    fit(seeded(Wide), WIDE, [callback], max_epochs=5)
    assert {label: tuple(start.shape) for label, start in callback._starts.items()} == {
        "backbone.0": (40, rank + 8),
        "backbone.2": (48, rank + 8),
    }
    assert len(callback.errors) == 60
    assert max(callback.errors) < 0.01


def test_batches_are_for_accelerators():
    assert not stable_rank.in_batches(torch.empty(2))
    assert stable_rank.in_batches(torch.empty(2, device="meta"))


@pytest.mark.parametrize("form", [{}, {"rank": 2, "p": 2}, {"rank": 2}], ids=str)
def test_no_step_but_the_first_waits(form, monkeypatch):
    found: list[list[str]] = []

    class Watched(StableRankRegularization):
        def on_before_optimizer_step(self, *arguments: Any) -> None:
            with Waits() as waits:
                super().on_before_optimizer_step(*arguments)
            found.append(waits.found)

    monkeypatch.setattr(stable_rank, "in_batches", lambda weight: True)
    fit(seeded(Pictures), PICTURES, [Watched("*", WEIGHT, **form)], max_epochs=2, precision="32-true")
    assert found[0]  # control: decompositions to begin with
    assert found[1:] == [[]] * 3


@pytest.mark.parametrize("form", [{"rank": None}, {"rank": 5, "p": 2}], ids=str)
def test_weights_that_change_fast_are_decomposed_anew(form, monkeypatch):
    errors = {}
    for threshold in (0.02, math.inf):
        monkeypatch.setattr(stable_rank, "_ERROR", threshold)
        callback, model = Compares("backbone.*", 0.01, **form), seeded(Wide)
        model.lr = 0.1
        fit(model, WIDE, [callback], max_epochs=5)
        errors[threshold] = max(callback.errors)
    assert errors[0.02] < 0.02 < 0.05 < errors[math.inf]


def test_vectors_left_behind_by_a_schedule_are_not_gone_on_from():
    schedule = Piecewise(boundaries=[2, 20], values=[1.0, 0.0, 1.0], unit="steps")
    callback = Compares("backbone.*", 0.01, rank=5, p=2, schedule=schedule)
    fit(seeded(Wide), WIDE, [callback], max_epochs=4)
    on = [error for step, error in enumerate(callback.errors) if step // 2 < 2 or step // 2 >= 20]
    assert max(on) < 0.01


@pytest.mark.parametrize("step", [4, 6, 9], ids=["first epoch", "between epochs", "second epoch"])
@pytest.mark.parametrize("form", [{}, {"rank": 5, "p": 2}, {"rank": 5, "every_n_steps": 2}], ids=str)
def test_resume_equals_uninterrupted(form, step, tolerance, tmp_path):
    def train(**settings: Any) -> Wide:
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=step, save_top_k=-1)
        model = seeded(Wide, optimizer="adamw")
        callback = StableRankRegularization("*", 0.1, **form)
        fit(model, WIDE, [callback, saving], enable_checkpointing=True, precision="32-true", **settings)
        return model

    straight = train()
    assert torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
    resumed = train(ckpt_path=tmp_path / f"step={step}.ckpt")
    assert_same(resumed, straight, rtol=0, atol=0)


def test_checkpoint_loads_without_the_plugin(tmp_path):
    trainer = fit(seeded(Model), BATCHES, [StableRankRegularization("*", WEIGHT, rank=2)])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    goes_on = seeded(Model)
    assert fit(goes_on, BATCHES, ckpt_path=tmp_path / "last.ckpt", max_epochs=3).global_step == 18


class Fails(Model):
    def on_train_epoch_end(self) -> None:
        raise KeyError("the user's own error")


@pytest.mark.parametrize("kind", [Model, Fails])
def test_module_is_untouched_afterwards(kind):
    model = seeded(Model)
    fit(model, BATCHES)
    before = {name: sorted(vars(module)) for name, module in model.named_modules()}
    model.__class__ = kind
    callback = StableRankRegularization("*", WEIGHT)
    if kind is Fails:
        with pytest.raises(KeyError, match="the user's own error"):
            fit(model, BATCHES, [callback])
    else:
        fit(model, BATCHES, [callback])
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == before
    assert not callback._in_use


def test_compiled():
    model, expected = seeded(Model), seeded(ByHand)
    fit(torch.compile(model, backend="aot_eager"), BATCHES, [StableRankRegularization("*", WEIGHT, rank=2)])
    fit(expected, BATCHES)
    weights = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    torch.testing.assert_close(weights, dict(expected.state_dict()))


class Manual(Model):
    """Two optimizers, of which the second steps every second time."""

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.by_hand = by_hand

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        for optimizer, layer, due in ((first, self.backbone[0], True), (second, self.head, batch_idx % 2 == 0)):
            if due:
                optimizer.zero_grad()
                term = WEIGHT * by_definition(layer.weight, 2, 1) if self.by_hand else 0.0
                self.manual_backward(self.loss(batch) + term)
                optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.backbone, self.head)]


def test_manual_optimization_with_two_optimizers():
    model, expected = seeded(Manual), seeded(Manual, by_hand=True)
    callback = StableRankRegularization(["backbone.0", "head"], WEIGHT, rank=2)
    fit(model, BATCHES, [callback])
    fit(expected, BATCHES)
    assert_same(model, expected)
    assert callback.state_dict()["steps"] == {0: 12, 1: 6}


def test_frozen_and_unused_weights_are_left_alone(tolerance):
    model = seeded(Model)
    model.unused = nn.Linear(6, 6)
    model.backbone[0].requires_grad_(False)
    frozen, unused = model.backbone[0].weight.clone(), model.unused.weight.clone()
    trainer = fit(model, BATCHES, [StableRankRegularization("*", WEIGHT)])
    assert "stable_rank/backbone.0" not in trainer.callback_metrics
    torch.testing.assert_close(model.backbone[0].weight, frozen.double(), rtol=0, atol=0)
    torch.testing.assert_close(model.unused.weight, unused.double(), rtol=0, atol=0)


class Pictures(LightningModule):
    """Every kind of layer that is supported, and some that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3)
        self.grouped = nn.Conv2d(8, 8, (3, 2), groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.apart = nn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=True)
        self.norm, self.tied = nn.LayerNorm(8), nn.Linear(8, 8)
        self.also_tied = nn.Linear(8, 8)
        self.also_tied.weight = self.tied.weight

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.depthwise(self.grouped(self.plain(batch))).flatten(2).mT
        x = self.attention(x, x, x)[0]
        x = self.apart(x, x[..., :6], x[..., :5])[0]
        return self.also_tied(self.tied(self.norm(x))).square().mean() + 0 * self.terms(self)

    terms = staticmethod(lambda model: 0.0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def pictures_by_hand(model: Pictures, scheme: int) -> dict[str, Tensor]:
    """The stable ranks, written out."""

    def of(matrix: Tensor) -> Tensor:
        return by_definition(matrix, None, 2)

    def unfolded(kernel: Tensor) -> Tensor:
        if scheme == 1:
            return kernel.flatten(1)
        return torch.stack([kernel[o, :, h].flatten() for o in range(len(kernel)) for h in range(3)])

    packed = model.attention.in_proj_weight.chunk(3)
    return {
        **({"depthwise": sum(of(unfolded(part)) for part in model.depthwise.weight.chunk(8))} if scheme == 2 else {}),
        "plain": of(unfolded(model.plain.weight)),
        "grouped": sum(of(unfolded(part)) for part in model.grouped.weight.chunk(2)),
        **{f"attention.{name}": of(part) for name, part in zip("qkv", packed, strict=True)},
        "attention.out_proj": of(model.attention.out_proj.weight),
        **{f"apart.{name}": of(getattr(model.apart, f"{name}_proj_weight")) for name in "qkv"},
        "apart.out_proj": of(model.apart.out_proj.weight),
        "tied": of(model.tied.weight),
    }


@pytest.mark.parametrize("scheme", [1, 2])
def test_kinds_of_layers(scheme, tolerance):
    batches = [torch.randn(2, 3, 12, 10, dtype=torch.float64) for _ in range(2)]

    class WrittenOut(Pictures):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + WEIGHT * sum(pictures_by_hand(self, scheme).values())

    model, expected = seeded(Pictures), seeded(WrittenOut)
    trainer = fit(model, batches, [StableRankRegularization("*", WEIGHT, scheme=scheme)], max_epochs=2)
    fit(expected, batches, max_epochs=2)
    assert_same(model, expected, **tolerance)
    logged = {name.removeprefix("stable_rank/") for name in trainer.callback_metrics}
    assert logged == {*pictures_by_hand(model, scheme), "penalty"}


def test_logs_the_sum_over_groups(tolerance):
    model = seeded(Pictures).double()
    expected = {name: value.detach() for name, value in pictures_by_hand(model, 1).items()}
    trainer = fit(model, PICTURES[:1], [StableRankRegularization("*", WEIGHT)], max_epochs=1)
    logged = {name.removeprefix("stable_rank/"): value.double() for name, value in trainer.callback_metrics.items()}
    penalty = logged.pop("penalty")
    torch.testing.assert_close(logged, expected)
    torch.testing.assert_close(penalty, WEIGHT * sum(expected.values()))


def test_logs_stable_ranks_and_penalty(tolerance):
    model = seeded(Model)
    ranks = {name: by_definition(model.get_submodule(name).weight.double(), None, 2) for name in ("backbone.0", "head")}
    callback = StableRankRegularization(["backbone.0", "head"], WEIGHT)
    logged = fit(model, BATCHES[:1], [callback], max_epochs=1).callback_metrics
    for name, value in ranks.items():
        torch.testing.assert_close(logged[f"stable_rank/{name}"], value.detach(), check_dtype=False)
    torch.testing.assert_close(logged["stable_rank/penalty"], WEIGHT * sum(ranks.values()).detach(), check_dtype=False)


class TurnsNaN(Model):
    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(4, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.side.weight[0, 0] = math.nan if batch_idx % 2 else 1.0
        return self.loss(batch) + 0 * self.side.bias.sum() + 0 * self.side.weight[1:].sum()


def test_nonfinite_term_is_skipped_warned_of_once_and_counted(tolerance):
    model = seeded(TurnsNaN)
    callback = StableRankRegularization("side", WEIGHT)
    with pytest.warns(UserWarning, match="left out of the loss") as caught:
        fit(model, BATCHES[:4], [callback], log_every_n_steps=1)
    assert sum("left out of the loss" in str(warning.message) for warning in caught) == 1
    assert callback.state_dict()["skipped"] == 4
    assert bool(model.side.weight[1:].isfinite().all())


def test_nonfinite_term_raises_where_asked(tolerance):
    with pytest.raises(FloatingPointError, match="'side'"):
        fit(seeded(TurnsNaN), BATCHES[:4], [StableRankRegularization("side", WEIGHT, on_nonfinite="raise")])


class OverRanks(Wide):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) * self.trainer.world_size  # DDP averages


def _trained(rank: int, form: dict[str, Any], strategy: Any) -> dict[str, Any]:
    seen = []
    in_batches = "batches" in form
    form = {name: value for name, value in form.items() if name != "batches"}

    class Counts(StableRankRegularization):
        def _term(self, target: Any, matrix: Tensor) -> Any:
            seen.append((target.label, matrix.numel()))
            return super()._term(target, matrix)

        def _terms(self, batches: Any) -> Any:
            for batch in batches:
                seen.extend((weight.label, math.prod(weight.shape)) for weight in batch.weights)
            return super()._terms(batches)

    model = seeded(OverRanks, optimizer="adamw")
    callback = Counts("*", 0.1, **form)
    settings = {} if strategy is None else {"strategy": strategy, "devices": 2}
    rows = (0, 3, 8) if strategy else (0, 8)
    with mock.patch.object(stable_rank, "in_batches", return_value=in_batches):
        fit(model, shard(WIDE, rows), [callback], use_distributed_sampler=False, **settings)
    state = callback.state_dict()
    return {"weights": dict(model.state_dict()), "starts": state["starts"], "seen": seen}


def _on_ranks(rank: int, forms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    _act_as_rank(rank)
    return [_trained(rank, form, "ddp") for form in forms]


def _act_as_rank(rank: int) -> None:
    """Lightning takes the running process group where the environment says who this process is."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="0")
    warnings.simplefilter("ignore")


@pytest.mark.distributed
def test_two_unequal_ranks_equal_one_process(tmp_path):
    forms: list[dict[str, Any]] = [{}, {"rank": 5, "p": 2}, {"rank": 5}]
    forms += [{**form, "batches": True} for form in forms]
    ranks = run_on_ranks(_on_ranks, 2, tmp_path, forms)
    for index, form in enumerate(forms):
        expected = _trained(0, form, None)
        one, other = ranks[0][index], ranks[1][index]
        torch.testing.assert_close(one["weights"], other["weights"], rtol=0, atol=0)
        torch.testing.assert_close(one["starts"], other["starts"], rtol=0, atol=0)
        torch.testing.assert_close(one["weights"], expected["weights"], rtol=1e-6, atol=1e-6)
        done, whole = [sum(size for _, size in part["seen"]) for part in (one, other)], expected["seen"]
        assert sorted(one["seen"] + other["seen"]) == sorted(whole)  # each computed once
        assert max(done) < 0.8 * sum(done)


class Untied(Pictures):
    def __init__(self) -> None:
        super().__init__()
        self.also_tied = nn.Identity()


class Sharded(Untied):
    """Its parameters are split over the ranks: of three input channels, evenly or not."""

    def configure_model(self) -> None:
        for layer in self.children():
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


PICTURES = [torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def _sharded(rank: int, in_batches: bool) -> dict[str, Any]:
    _act_as_rank(rank)
    model = seeded(Sharded)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    callback = StableRankRegularization("*", WEIGHT, rank=2, scheme=2)
    settings = {"strategy": strategy, "devices": 2, "precision": "32-true", "use_distributed_sampler": False}
    with mock.patch.object(stable_rank, "in_batches", return_value=in_batches):
        fit(model, PICTURES, [callback], **settings)
    kind = type(model.attention.in_proj_weight.data).__name__
    return {"kind": kind, "weights": {name: full_tensor(value) for name, value in model.state_dict().items()}}


@pytest.mark.distributed
@pytest.mark.parametrize("in_batches", [False, True])
def test_sharded_parameters_train_like_whole_ones(in_batches, tmp_path, monkeypatch):
    monkeypatch.setattr(stable_rank, "in_batches", lambda weight: in_batches)
    expected, plain = seeded(Untied), seeded(Untied)
    fit(expected, PICTURES, [StableRankRegularization("*", WEIGHT, rank=2, scheme=2)], precision="32-true")
    fit(plain, PICTURES, precision="32-true")
    for rank in run_on_ranks(_sharded, 2, tmp_path, in_batches):
        assert rank["kind"] == "DTensor"  # control: the strategy did split the parameters
        torch.testing.assert_close(rank["weights"], dict(expected.state_dict()), rtol=1e-4, atol=1e-5)
    assert_different(expected, plain)


def test_yaml(tmp_path):
    config = """
- class_path: lightning_plugins.callbacks.StableRankRegularization
  init_args: {layers: "*", weight: 0.3, rank: %s, p: 2, scheme: 1, every_n_steps: 2, on_nonfinite: skip}
"""
    for rank, expected in (("2", 2), ("0.5", 0.5), ("null", None), ("{backbone.0: 2}", {"backbone.0": 2})):
        (tmp_path / "config.yaml").write_text("trainer:\n  logger: false\n  callbacks:\n" + _indented(config % rank))
        cli = LightningCLI(
            Model, run=False, args=["--config", str(tmp_path / "config.yaml")], save_config_callback=None
        )
        (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, StableRankRegularization))
        assert callback.rank == expected
        assert type(callback.rank) is type(expected)


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.strip().splitlines())


def test_same_arguments_same_key_and_others_another():
    base = {"layers": "a", "weight": 0.1, "rank": 2}
    changes = [{"layers": "b"}, {"weight": 0.2}, {"rank": 3}, {"p": 2}, {"scheme": 2}, {"every_n_steps": 2}]
    keys = [StableRankRegularization(**{**base, **change}).state_key for change in [{}, *changes]]
    assert len(set(keys)) == len(keys)
    assert keys[0] == StableRankRegularization(**base).state_key


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": []}, ValueError, "`layers` must be a module name"),
        ({"layers": "head:input"}, ValueError, "not its input or output"),
        ({"layers": 3}, TypeError, "`layers` must be a module name"),
        ({"weight": math.nan}, ValueError, "`weight` must be finite"),
        ({"weight": "0.1"}, TypeError, "`weight` must be a number"),
        ({"rank": 0}, ValueError, "`rank` must be at least 1, got 0"),
        ({"rank": True}, TypeError, "`rank` must be a number"),
        ({"rank": 1.5}, ValueError, "`rank` must be a number of at least 1 or a fraction"),
        ({"rank": 8.0}, ValueError, "got 8.0; did you mean 8"),
        ({"rank": {"head": 0}}, ValueError, r"`rank\['head'\]` must be at least 1"),
        ({"rank": {"head": 0.5}}, TypeError, r"`rank\['head'\]` must be an int"),
        ({"rank": "2"}, TypeError, "`rank` must be a number"),
        ({"p": 3}, ValueError, "`p` must be 1 or 2, got 3"),
        ({"scheme": 0}, ValueError, "`scheme` must be 1 or 2, got 0"),
        ({"every_n_steps": 0}, ValueError, "`every_n_steps` must be at least 1"),
        ({"on_nonfinite": "skp"}, ValueError, "did you mean 'skip'"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        StableRankRegularization(**{"layers": "head", "weight": 0.1, **arguments})


def lazy() -> Model:
    model = Model()
    model.head = nn.LazyLinear(3)
    return model


def normed() -> Model:
    model = Model()
    nn.utils.parametrizations.weight_norm(model.head)
    return model


def with_layer(layer: nn.Module) -> Model:
    model = Model()
    model.extra = layer
    return model


def lbfgs() -> Model:
    model = Model()
    model.configure_optimizers = lambda: torch.optim.LBFGS(model.parameters())
    return model


def head_alone() -> Model:
    model = Model()
    model.configure_optimizers = lambda: torch.optim.SGD(model.head.parameters(), lr=0.1)
    return model


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (Model, {"layers": "hed"}, "did you mean 'head'"),
        (Model, {"layers": "backbone.1"}, "must match modules of the types .*Linear.*got Tanh"),
        (lambda: with_layer(nn.Embedding(4, 3)), {"layers": "extra"}, "got Embedding"),
        (
            lambda: with_layer(nn.Conv2d(4, 4, 3, groups=4)),
            {"layers": "extra"},
            r"'extra' must have a matrix.*\(4, 1, 9\)",
        ),
        (lambda: with_layer(nn.Conv2d(4, 4, 3, groups=4)), {"layers": "extr*"}, "must match a weight with two rows"),
        (
            lambda: with_layer(nn.Conv1d(4, 4, 3)),
            {"layers": "extra", "scheme": 2},
            "got Conv1d 'extra'; pass `scheme=1`",
        ),
        (lazy, {"layers": "head"}, "'head' must have a shape, but it is lazy"),
        (Model, {"rank": 20}, "`rank` must be below the smaller side of at least one of 1 matrices, got 20"),
        (Model, {"rank": {"haed": 2}}, "got 'haed'; did you mean 'head'"),
        (Model, {"layers": "*", "rank": {"head": 2}}, r"got none for \['backbone.0', 'backbone.2'\]"),
        (lbfgs, {}, "LBFGS compares losses.*`StableRankMixin`"),
        (head_alone, {"layers": "backbone.*"}, "an optimizer must train at least one of backbone.0, backbone.2"),
        (Model, {"schedule": Linear(0.0, 1.0), "trainer": {"max_epochs": -1, "max_steps": -1}}, "max_epochs=-1"),
    ],
)
def test_wrong_combinations_are_named(model, arguments, message):
    trainer = arguments.pop("trainer", {}) if "trainer" in arguments else {}
    with pytest.raises(Exception, match=message):
        fit(
            model(),
            BATCHES[:1],
            [StableRankRegularization(**{"layers": "head", "weight": 0.1, **arguments})],
            **trainer,
        )


def test_a_module_of_the_other_package_is_refused():
    callback = StableRankRegularization("head", 0.1)
    with pytest.raises(Exception, match="works with modules of `lightning"):
        callback.setup(Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"), nn.Linear(2, 2), "fit")
