"""Attributions evaluated inside a Trainer: right values, nothing left behind, one process or several."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from lightning_plugins.callbacks import AttributionEvaluation, BatchKeys, SampleSelection, attribution_evaluation
from lightning_plugins.functional.attribution import (
    CurveSteps,
    localization_iou,
    perturbation_curve,
    random_attributions,
)
from lightning_plugins.metrics import DegradationScore, LocalizationIoU
from tests._processes import run_on_ranks
from tests.contract_ranks import act_as_rank
from tests.models import Batches, shard

LENGTH = 32
CAPTUM = {
    "saliency": None,
    "integrated_gradients": {"n_steps": 8},
    "input_x_gradient": None,
    "guided_backprop": None,
    "lrp": None,
    "lime": {"n_samples": 12, "patch": 8},
    "kernel_shap": {"n_samples": 12, "patch": 8},
    "deeplift": None,
    "deeplift_shap": None,
    "gradcam": "net.3",
    "guided_gradcam": {"layer": "net.3"},
}
METRICS = {"iou": LocalizationIoU(), "degradation": DegradationScore(steps=4, baseline=False)}


class Net(LightningModule):
    def __init__(self, **_):
        super().__init__()
        torch.manual_seed(1)
        layers = [nn.Conv1d(1, 4, 5, padding=2), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 6, 5, 2, 2), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 2))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches(count=3, rows=6):
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        x = torch.randn(rows, 1, LENGTH, generator=generator)
        y = torch.randint(2, (rows,), generator=generator)
        made.append((x, y, torch.rand(rows, LENGTH, generator=generator) < 0.3))
    return made


def trainer(callbacks, **settings):
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**quiet, **settings}, callbacks=callbacks)


def evaluate(methods, model=None, data=None, run=None, **settings):
    callback = AttributionEvaluation(
        methods, **{"batch": BatchKeys(mask=2), "metrics": METRICS, "examples": 0, **settings}
    )
    runner = trainer([callback], **(run or {}))
    runner.test(model or Net(), Batches(data or batches()), verbose=False)
    return callback, runner


def gradient(net):
    def explain(x, target):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(net(x).gather(1, target[:, None]).sum(), x)[0]

    return explain


def test_scores_are_those_of_the_functions_over_all_samples():
    model = Net()
    callback, runner = evaluate(["saliency"], model)
    x, y, masks = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    model.eval()
    maps = gradient(model)(x, y)
    scores = callback.report.scores
    for row, own in (("saliency", maps), ("saliency/abs", maps.abs()), ("random", random_attributions(x))):
        assert scores[row]["iou"]["score"] == pytest.approx(localization_iou(own, masks).score.mean().item(), abs=1e-6)
        curves = [
            perturbation_curve(model, x, own, y, order=order, steps=CurveSteps(count=4, spread=True)).mean(0)
            for order in ("least", "most")
        ]
        scaled = [(curve - curve[-1]) / (curve[0] - curve[-1]) for curve in curves]
        wanted = (scaled[0] - scaled[1]).mean().item()
        assert scores[row]["degradation"]["score"] == pytest.approx(wanted, abs=1e-4)
    assert set(runner.callback_metrics) == {
        "loss",
        *(f"attribution/{row}/{name}" for row in ("saliency", "saliency/abs", "random") for name in METRICS),
    }
    assert scores["saliency"]["degradation"]["random"] == scores["random"]["degradation"]["score"]


def anatomy(model):
    """All that could be left behind."""
    seen = {}
    for name, module in model.named_modules():
        hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks") and value is not None}
        seen[name] = (module.training, hooks, sorted(vars(module)) if name else None)  # a Trainer adds to the outermost
    seen["grads"] = [(p.grad, p.requires_grad) for p in model.parameters()]
    seen["weights"] = {name: value.clone() for name, value in model.state_dict().items()}
    return seen


@pytest.mark.parametrize("mode", ["inference", "no_grad"])
def test_all_eleven_methods_leave_the_model_as_it_was(mode):
    model = Net()
    before, (callback, _) = anatomy(model), evaluate(CAPTUM, model, run={"inference_mode": mode == "inference"})
    after = anatomy(model)
    torch.testing.assert_close(after.pop("weights"), before.pop("weights"), rtol=0, atol=0)
    assert after == before
    scores = callback.report.scores
    assert set(scores) == {*CAPTUM, *(f"{name}/abs" for name in CAPTUM), "random"}
    assert all(0 <= row["iou"]["score"] <= 1 for row in scores.values())
    assert all(row["iou"]["samples"] == 18 for row in scores.values())
    raw = [scores[name]["iou"]["score"] for name in CAPTUM]
    assert len({round(value, 6) for value in raw}) >= 8  # the methods do differ


def test_methods_that_fail_take_their_hooks_off():
    model = Net().eval()  # in which an error leaves it
    before = anatomy(model)

    def fails(x, target):
        model.net[2].register_forward_hook(lambda *_: None)
        model.net[0].strange = 1
        raise KeyError("a method's own error")

    with pytest.raises(KeyError, match="a method's own error"):
        evaluate({"mine": fails}, model)
    after = anatomy(model)
    after.pop("weights"), before.pop("weights")
    assert after == before


HALF = {"16-true": torch.half, "bf16-true": torch.bfloat16, "bf16-mixed": torch.bfloat16}


@pytest.mark.parametrize("precision", [*HALF, "64-true"])
def test_precisions(precision):
    # numbers that all precisions have, since samples draw their random numbers from their contents
    data = [(x.to(HALF.get(precision, x.dtype)).float(), y, masks) for x, y, masks in batches()]
    names = ("saliency", "gradcam", "guided_backprop", "deeplift", "lime", "kernel_shap")
    methods, metrics = {name: CAPTUM[name] for name in names}, ["iou", "rank_accuracy", "auroc"]
    exact, _ = evaluate(methods, data=data, metrics=metrics)
    own, _ = evaluate(methods, data=data, metrics=metrics, run={"precision": precision})
    for row, cells in exact.report.scores.items():
        tolerance = 0.05 if precision in HALF and row != "random" else 1e-4
        for name, cell in cells.items():
            found = own.report.scores[row][name]["score"]
            assert found == pytest.approx(cell["score"], abs=tolerance), (row, name)


@pytest.mark.parametrize("limit", [1, 5, 1000])
def test_the_bound_on_forward_passes_changes_nothing(limit):
    seen = []

    class Watched(Net):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    methods = {name: CAPTUM[name] for name in ("saliency", "integrated_gradients", "gradcam", "lime", "kernel_shap")}
    metrics = ["iou", "degradation", "faithfulness_correlation", "infidelity", "sensitivity"]
    callback, _ = evaluate(methods, Watched(), batches(1, 4), max_forward_batch=limit, metrics=metrics)
    other, _ = evaluate(methods, Net(), batches(1, 4), max_forward_batch=37, metrics=metrics)
    for row, own in other.report.scores.items():
        for name, cell in own.items():
            found = callback.report.scores[row][name]["score"]
            assert found == pytest.approx(cell["score"], abs=2e-4, nan_ok=True), (row, name)
    assert max(seen) <= max(limit, 4)  # 4: the batch of the user's own step


def test_batches_change_nothing():
    whole, _ = evaluate(CAPTUM, data=batches(1, 8))
    (x, y, masks) = batches(1, 8)[0]
    parts, _ = evaluate(CAPTUM, data=[(x[rows], y[rows], masks[rows]) for rows in (slice(0, 1), slice(1, 8))])
    for row, own in whole.report.scores.items():
        for name, cell in own.items():
            assert parts.report.scores[row][name]["score"] == pytest.approx(cell["score"], abs=1e-4), (row, name)


def test_selection_by_class_probability_and_number():
    model = Net()
    x, y, _ = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    with torch.no_grad():
        p = model.eval()(x).softmax(1).gather(1, y[:, None])[:, 0]
    least = float(p.median())
    callback, _ = evaluate(["saliency"], model, samples=SampleSelection(select=least, classes=[1]))
    assert callback.report.samples == int(((p > least) & (y == 1)).sum())
    assert callback.report.seen == 18
    callback, _ = evaluate(["saliency"], model, samples=SampleSelection(select=lambda own: own < least, max_samples=4))
    assert callback.report.samples == 4
    with pytest.warns(UserWarning, match=r"none of 18 samples was chosen by `classes=\(7,\)`"):
        callback, _ = evaluate(["saliency"], model, samples=SampleSelection(classes=[7]))
    assert math.isnan(callback.report.scores["saliency"]["iou"]["score"])
    assert json.loads(callback.report.to_json())["scores"]["saliency"]["iou"]["score"] is None


def test_table_json_and_figures(tmp_path):
    methods = {"saliency": None, "mine": lambda x, target: x, "half": {"method": "gradcam", "layer": "net.3"}}
    callback, _ = evaluate(methods, examples=2, run={"default_root_dir": tmp_path})
    console = Console(width=140, record=True)
    console.print(callback.report.table())
    text = console.export_text()
    assert "half/abs" in text
    assert "18 of 18 samples" in text
    assert set(json.loads(callback.report.to_json())["scores"]["mine"]) == set(METRICS)
    assert {path.name for path in (tmp_path / "attribution").iterdir()} == {
        "degradation.png",
        "example_1.png",
        "example_2.png",
    }
    logger = TensorBoardLogger(tmp_path / "board")
    evaluate(methods, examples=1, run={"logger": logger})
    assert list(Path(logger.log_dir).glob("events*"))


def test_in_validation_of_a_training_without_touching_it():
    callback = AttributionEvaluation(
        ["saliency"], batch=BatchKeys(mask=2), stage="validate", metrics=["iou"], examples=0
    )
    plain, watched = Net(), Net()
    for model, callbacks in ((plain, []), (watched, [callback])):
        runner = trainer(callbacks, max_epochs=2)
        runner.fit(model, Batches(batches()), Batches(batches()))
    torch.testing.assert_close(dict(watched.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
    assert "attribution/saliency/iou" in runner.callback_metrics
    assert callback.report.samples == 18


@pytest.mark.parametrize(("stage", "made"), [("validate", 2), ("test", 1)])
def test_methods_are_made_for_the_stage_that_is_evaluated_alone(stage, made, monkeypatch):
    calls = []
    build = attribution_evaluation.method_calls
    monkeypatch.setattr(attribution_evaluation, "method_calls", lambda *a, **k: calls.append(stage) or build(*a, **k))
    callback = AttributionEvaluation(["saliency"], batch=BatchKeys(mask=2), stage=stage, metrics=["iou"], examples=0)
    runner, model, data = trainer([callback], max_epochs=2, num_sanity_val_steps=1), Net(), Batches(batches())
    runner.fit(model, data, data)
    assert len(calls) == (made if stage == "validate" else 0)  # an epoch each, and none in the sanity check
    runner.test(model, data, verbose=False)
    assert len(calls) == made


def rank_report(rank, bounds, classes):
    if len(bounds) > 2:
        act_as_rank(rank, len(bounds) - 1)
        mine = shard(batches(), bounds)
        run = {"strategy": "ddp", "devices": len(bounds) - 1}
    else:
        mine, run = batches(), {}
    methods = {name: CAPTUM[name] for name in ("saliency", "gradcam", "guided_backprop", "lime")}
    metrics = ["iou", "attribution_localization", "degradation", "infidelity"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callback, _ = evaluate(methods, data=mine, metrics=metrics, run=run, samples=SampleSelection(classes=classes))
    return json.loads(callback.report.to_json())


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("bounds", "classes", "samples"),
    [((0, 2, 6), None, 18), ((0, 3, 4, 6), [1], 6)],
    ids=["two", "three, one of which chooses no sample"],
)
def test_unequal_ranks_equal_one_process(bounds, classes, samples, tmp_path):
    expected = rank_report(0, (0, 6), classes)
    for found in run_on_ranks(rank_report, len(bounds) - 1, tmp_path, bounds, classes):
        assert (found["samples"], found["seen"]) == (samples, 18)
        for row, own in expected["scores"].items():
            for name, cell in own.items():
                assert found["scores"][row][name]["score"] == pytest.approx(cell["score"], abs=1e-4), (row, name)
