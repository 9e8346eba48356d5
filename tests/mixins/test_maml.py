"""Training, validation, test and prediction by the mixin, against a loop that stands in the test."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call
from torchmetrics import MeanSquaredError

from lightning_plugins.meta import GAP, ApproximateGAP, MetaSGD, Vectorization, use_per_step_statistics
from lightning_plugins.mixins import GAPMixin, InnerSettings, MAMLMixin
from tests.mixins.few_shot import (
    RATE,
    ByHand,
    Few,
    FewGAP,
    as_double,
    assert_learned_alike,
    make_tasks,
    mlp,
    weights,
)
from tests.models import Batches, fit

BATCHES = make_tasks()
TRAINERS = {
    "plain": {},
    "accumulated and clipped": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "validated": {"validation": Batches(BATCHES[:2]), "num_sanity_val_steps": 2, "val_check_interval": 2},
    "without epochs": {"max_epochs": -1, "max_steps": 5},
    "fast_dev_run": {"fast_dev_run": True, "validation": Batches(BATCHES)},
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_trains_as_written_by_hand(trainer: str):
    model, expected = FewGAP(), ByHand()
    fit(model, BATCHES, **TRAINERS[trainer])
    settings = {name: value for name, value in TRAINERS[trainer].items() if "val" not in name or "clip" in name}
    fit(expected, BATCHES, **settings)
    assert_learned_alike(model, expected)
    assert not torch.equal(model.network[0].weight, mlp()[0].weight.double())  # control: it did train


def test_maml_trains_as_written_by_hand():
    model, expected = Few(learning_rate=0.01), ByHand(gap=False)
    fit(model, BATCHES)
    fit(expected, BATCHES)
    assert_learned_alike(model, expected)


@pytest.mark.parametrize("rates", [(0.0, 0.05), (0.01, 0.0)], ids=str)
def test_each_of_the_two_rates_is_that_of_its_parameters(rates: tuple[float, float]):
    model = FewGAP(learning_rate=rates[0], preconditioner_learning_rate=rates[1]).double()
    before = {name: value.clone() for name, value in weights(model).items()}
    fit(model, BATCHES, max_epochs=1)
    for name, value in weights(model).items():
        rate = rates[1] if ".raw." in name else rates[0]
        assert torch.equal(value, before[name]) is (rate == 0)


def test_groups_name_their_parameters():
    model = Few(MetaSGD(), inner={"rates": "learned"}, learning_rate=0.1)
    model.extra = nn.Linear(1, 1)
    groups = model.parameter_groups()
    assert [(group["name"], group["lr"]) for group in groups] == [("weights", 0.1), ("preconditioner", 0.1)]
    assert len(groups[0]["params"]) == 6 + 2
    assert len(groups[1]["params"]) == 6 + 6
    assert [group["name"] for group in Few().parameter_groups()] == ["weights"]


def differentiable(model: MAMLMixin) -> Any:
    model.double().train()
    for i, parameter in enumerate(model.inner_loop.preconditioner.parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        parameter.data *= 1 + 0.3 * noise
    return model


SETTINGS = {
    "MAML": Few,
    "MAML, every step": lambda: Few(step_weights=[0.5, 1.0], inner={"rates": "learned_per_step"}),
    "Meta-SGD": lambda: Few(MetaSGD()),
    "GAP": lambda: FewGAP(GAP(linear=True, derivative="exact")),
    "approximate GAP": lambda: FewGAP(ApproximateGAP(linear=True)),
    "head": lambda: Few(inner={"layers": "4"}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_gradient_of_a_training_step_is_that_of_finite_differences(name: str):
    """For the weights and for all that is learned besides, through the whole inner loop."""
    model, (batch,) = differentiable(SETTINGS[name]()), as_double(make_tasks(1, 3))

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return self.model.training_step(batch, 0)

    step = Step()
    names, values = zip(*step.named_parameters(), strict=True)
    assert gradcheck(lambda *new: functional_call(step, dict(zip(names, new, strict=True)), ()), values)


@pytest.mark.parametrize("first", [False, True])
def test_the_gradient_of_a_training_step_is_that_of_the_published_update(first: bool):
    """An independent one, by plain autograd; the first-order gradient is another one."""
    model, expected, (batch,) = (
        FewGAP(inner={"first_order": first}).double(),
        ByHand().double(),
        as_double(make_tasks(1)),
    )
    model.training_step(batch, 0).backward()
    expected.training_step(batch, 0).backward()
    found = [parameter.grad for parameter in model.parameters()]
    difference = max(float((a - p.grad).abs().max()) for a, p in zip(found, expected.parameters(), strict=True))
    assert (difference > 1e-3) if first else (difference < 1e-12)


def trainer_for(**settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, precision="64-true", **settings,
    )  # fmt: skip


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("inner", [{}, {"vectorize": False}, {"vectorize": Vectorization(chunk_size=2)}], ids=str)
def test_validation_test_and_prediction(inner: dict[str, Any], inference_mode: bool):
    batches = [BATCHES[0], *make_tasks(1, 2, seed=5)]
    model, expected = FewGAP(inner=inner), ByHand().double()
    trainer = trainer_for(inference_mode=inference_mode)
    losses = torch.cat([expected.losses(batch, 3) for batch in as_double(batches)]).detach()
    before = {name: value.double() for name, value in weights(model).items()}
    for stage, run in (("val", trainer.validate), ("test", trainer.test)):
        (logged,) = run(model, Batches(batches), verbose=False)
        torch.testing.assert_close(logged[f"{stage}/loss"], losses.mean().item())  # 7 tasks in batches of 5 and 2
    both = trainer.predict(model, Batches(batches))
    inputs_only = trainer.predict(model, Batches([(support, query[0]) for support, query in batches]))
    torch.testing.assert_close(inputs_only, both, rtol=0, atol=0)
    targets = [query[1].double() for _, query in batches]
    errors = [(outputs - y).square().mean((1, 2)) for outputs, y in zip(both, targets, strict=True)]
    torch.testing.assert_close(torch.cat(errors), losses)
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)


def test_calling_the_module_adapts_and_carries_the_gradient():
    model, (batch,) = FewGAP(), make_tasks(1)
    outputs = model(batch[0], batch[1][0])
    torch.testing.assert_close(F.mse_loss(outputs, batch[1][1]), model.eval().adapt_and_measure(batch).loss)
    assert outputs.requires_grad


def test_metrics_and_logged_names(tmp_path: Any):
    model = FewGAP(metrics={"mse": MeanSquaredError()})
    logger = CSVLogger(tmp_path)
    trainer = fit(
        model, BATCHES, [LearningRateMonitor()], logger=logger, log_every_n_steps=3, validation=Batches(BATCHES[:2])
    )
    gains = {f"gap/{layer}/gain_{end}" for layer in (0, 2, 4) for end in ("min", "max")}
    rates = {"lr-Adam/weights", "lr-Adam/preconditioner"}
    assert set(trainer.callback_metrics) == {"train/loss", "val/loss", "val/mse", *gains, *rates}
    logged = trainer.callback_metrics
    torch.testing.assert_close(logged["val/mse"], logged["val/loss"], check_dtype=False, rtol=1e-5, atol=0)
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    columns = [dict(zip(header, row.split(","), strict=True)) for row in rows[1:]]
    with_gains = [int(row["step"]) for row in columns if row["gap/0/gain_min"]]
    assert with_gains == [2, 5]  # the steps at which a logger looks
    assert rates <= set(header)


def test_gains_are_looked_at_only_when_the_trainer_logs(monkeypatch: pytest.MonkeyPatch):
    model, steps = FewGAP(), []
    gains = model.gains
    monkeypatch.setattr(model, "gains", lambda: [steps.append(model.global_step), gains()][1])
    fit(model, BATCHES, log_every_n_steps=3)
    assert steps == [0, 2, 5]


def test_gains_by_layer():
    shared, each = FewGAP(), FewGAP(GAP(linear=True, per_step=True))
    assert {name: tuple(gains.shape) for name, gains in shared.gains().items()} == {"0": (2,), "2": (3,), "4": (1,)}
    assert {name: tuple(gains.shape) for name, gains in each.gains().items()} == {
        "0": (2, 2), "2": (2, 3), "4": (2, 1),
    }  # fmt: skip
    alone = type("Alone", (GAPMixin, LightningModule), {})(nn.Linear(2, 1), F.mse_loss, GAP(linear=True))
    assert list(alone.gains()) == ["network"]


class OwnSteps(FewGAP):
    """Composes its own loss, and brings its own optimizer."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        episodes = self.adapt_and_measure(batch)
        decay = sum(parameter.square().sum() for parameter in self.network.parameters())
        return episodes.loss + 0.1 * decay

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameter_groups(), momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class OwnStepsByHand(ByHand):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        decay = sum(parameter.square().sum() for parameter in self.network.parameters())
        return super().training_step(batch, batch_idx) + 0.1 * decay

    configure_optimizers = OwnSteps.configure_optimizers

    def parameter_groups(self) -> Any:
        return super().configure_optimizers().param_groups


class Manual(FewGAP):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.adapt_and_measure(batch).loss)
        optimizer.step()


def test_own_steps_and_optimizers():
    model, expected = OwnSteps(), OwnStepsByHand()
    fit(model, BATCHES)
    for parameter in expected.parameters():
        parameter.requires_grad_()
    expected.parameter_groups = lambda: [
        {"params": list(expected.network.parameters()), "lr": 0.01},
        {"params": list(expected.raw), "lr": 0.05},
    ]
    fit(expected, BATCHES)
    assert_learned_alike(model, expected)


def test_manual_optimization():
    model, expected = Manual(), ByHand()
    fit(model, BATCHES)
    fit(expected, BATCHES)
    assert_learned_alike(model, expected)


def test_accumulated_task_batches_are_one_big_batch():
    def together(first: Any, second: Any) -> Any:
        return tuple(
            tuple(torch.cat(tensors) for tensors in zip(*pairs, strict=True))
            for pairs in zip(first, second, strict=True)
        )

    model, expected = FewGAP(), FewGAP()
    fit(model, BATCHES, accumulate_grad_batches=2)
    fit(expected, [together(*BATCHES[:2]), together(*BATCHES[2:])])
    torch.testing.assert_close(weights(model), weights(expected))


def test_a_checkpoint_holds_the_gains_and_loads_without_a_trainer(tmp_path: Any):
    model = FewGAP()
    saving = ModelCheckpoint(tmp_path, filename="last")
    fit(model, BATCHES, [saving], enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    gains = {name for name in checkpoint["state_dict"] if "preconditioner" in name}
    assert gains == {f"inner_loop.preconditioner.raw.{layer}/weight" for layer in (0, 2, 4)}
    loaded = FewGAP.load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu").double()
    torch.testing.assert_close(weights(loaded), weights(model))
    assert not loaded.gains()["2"].allclose(torch.tensor(1.0006, dtype=torch.float64), atol=1e-3)


def test_fits_twice():
    model, expected = FewGAP(), ByHand()
    for _ in range(2):
        fit(model, BATCHES)
        fit(expected, BATCHES)
    assert_learned_alike(model, expected)


class WithNorms(MAMLMixin, LightningModule):
    def __init__(self) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
        super().__init__(
            use_per_step_statistics(network, 2), F.mse_loss, inner=InnerSettings(steps=2, learning_rate=RATE)
        )


def test_statistics_per_step_are_updated_in_training_alone():
    model = WithNorms()
    fit(model, BATCHES, validation=Batches(BATCHES[:2]), max_epochs=1)
    assert model.network[1].num_batches_tracked.tolist() == [len(BATCHES)] * 3
    fit(model, BATCHES, validation=Batches(BATCHES[:2]), max_epochs=1)
    assert model.network[1].num_batches_tracked.tolist() == [2 * len(BATCHES)] * 3
