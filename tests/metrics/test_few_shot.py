"""Accuracy and curves over tasks, and their intervals, against numpy and over ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from lightning_plugins.metrics import AdaptationCurve, FewShotAccuracy, FewShotAccuracyInterval
from tests._processes import run_on_ranks


def tasks(number, samples=7, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, samples, classes, generator=generator), torch.randint(
        classes, (number, samples), generator=generator
    )


def both():
    return MetricCollection({"accuracy": FewShotAccuracy(), "interval": FewShotAccuracyInterval()})


def by_numpy(outputs, targets):
    accuracies = (outputs.numpy().argmax(-1) == targets.numpy()).mean(1)
    half = 1.96 * accuracies.std(ddof=1) / np.sqrt(len(accuracies))
    return {"accuracy": torch.tensor(accuracies.mean()), "interval": torch.tensor(half)}


@given(sizes=st.lists(st.integers(0, 4), max_size=3), seed=st.integers(0, 2**31))
def test_equals_numpy_however_the_tasks_are_split(sizes, seed):
    outputs, targets = tasks(sum(sizes) + 2, seed=seed)
    metrics = both()
    for parts in zip(outputs.split([*sizes, 2]), targets.split([*sizes, 2]), strict=True):
        metrics.update(*parts)
    torch.testing.assert_close(metrics.compute(), by_numpy(outputs, targets))


def test_a_collection_keeps_the_sums_once():
    metrics = both()
    metrics.update(*tasks(3))
    assert metrics.compute_groups == {0: ["accuracy", "interval"]}


def test_too_few_tasks_and_equal_ones():
    assert FewShotAccuracy()(*tasks(0)).isnan()
    assert FewShotAccuracyInterval()(*tasks(1)).isnan()
    outputs, targets = (tensor.expand(600, *tensor.shape[1:]) for tensor in tasks(1, seed=2))
    torch.testing.assert_close(FewShotAccuracyInterval()(outputs, targets).item(), 0.0, rtol=0, atol=1e-8)


def test_half_precision_outputs():
    outputs, targets = tasks(4)
    expected = by_numpy(outputs.bfloat16().float(), targets)["accuracy"]
    torch.testing.assert_close(FewShotAccuracy()(outputs.bfloat16(), targets), expected)


def values(number, seed=0):
    return 100 + torch.randn(number, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("number", [2, 3, 50])
def test_curve_equals_numpy(number):
    metric = AdaptationCurve(steps=3)
    for part in values(number).split(7):
        metric.update(part)
    mean, interval = metric.compute()
    torch.testing.assert_close(mean, values(number).mean(0))
    expected = 1.96 * values(number).numpy().std(0, ddof=1) / np.sqrt(number)
    torch.testing.assert_close(interval, torch.from_numpy(expected))
    assert metric.compute()._fields == ("mean", "interval")


def test_curve_of_one_task_and_of_none():
    metric = AdaptationCurve(steps=3)
    assert metric(values(1)).interval.isnan().all()
    assert AdaptationCurve(steps=3)(values(0)).mean.isnan().all()


def of_rank(rank):
    part = slice(0, 2) if rank == 0 else slice(2, 9)
    metrics, curve = both(), AdaptationCurve(steps=3)
    metrics.update(*(tensor[part] for tensor in tasks(9)))
    curve.update(values(9)[part])
    return metrics.compute(), tuple(curve.compute())


@pytest.mark.distributed
def test_two_unequal_ranks_equal_one_process(tmp_path):
    curve = AdaptationCurve(steps=3)
    curve.update(values(9))
    for found, of_curve in run_on_ranks(of_rank, 2, tmp_path):
        torch.testing.assert_close(found, by_numpy(*tasks(9)))
        torch.testing.assert_close(of_curve, tuple(curve.compute()))


OUTPUTS, TARGETS = tasks(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: FewShotAccuracy()(OUTPUTS.long(), TARGETS),
            TypeError,
            "`outputs` must be.*got torch.int64",
        ),
        (lambda: FewShotAccuracy()(OUTPUTS, TARGETS.float()), TypeError, "`targets` must be integers.*torch.float32"),
        (lambda: FewShotAccuracy()(OUTPUTS[0], TARGETS[0]), ValueError, r"\(tasks, samples, classes\).*unsqueeze"),
        (lambda: FewShotAccuracy()(OUTPUTS, TARGETS[:2]), ValueError, r"`targets`.*\(3, 7\).*got \(2, 7\)"),
        (lambda: FewShotAccuracy()(OUTPUTS[:, :0], TARGETS[:, :0]), ValueError, "a sample and a class in every task"),
        (lambda: AdaptationCurve(-1), ValueError, "`steps` must be at least 0"),
        (lambda: AdaptationCurve(3)(torch.ones(2, 3)), ValueError, r"`values` must have shape \(tasks, 4\)"),
        (lambda: AdaptationCurve(3)(torch.ones(2, 4).int()), TypeError, "`values` must be a floating tensor"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
