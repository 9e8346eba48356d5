"""Metrics of attributions: sums by class, batches, ranks, baselines and skill."""

import math

import pytest
import torch
from torch import nn

from lightning_plugins.functional.attribution import (
    CurveSteps,
    Perturbation,
    degradation_score,
    faithfulness_correlation,
    infidelity,
    localization_iou,
    perturbation_curve,
    random_attributions,
    sensitivity,
)
from lightning_plugins.metrics import (
    AttributionAUROC,
    AttributionLocalization,
    DegradationScore,
    FaithfulnessCorrelation,
    Infidelity,
    LocalizationIoU,
    PointingGame,
    RegionPerturbation,
    RelevanceRankAccuracy,
    Sensitivity,
)
from tests._processes import run_on_ranks

LENGTH, CLASSES = 24, 3
HOW = Perturbation(4, "mean")


def network():
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(LENGTH, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double().eval()


def data(rows=11):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 1, LENGTH, generator=generator, dtype=torch.float64)
    maps = torch.randn(rows, 1, LENGTH, generator=generator, dtype=torch.float64)
    masks = torch.rand(rows, LENGTH, generator=generator) < 0.4
    return x, maps, masks, torch.randint(CLASSES, (rows,), generator=generator)


def explain(inputs, target):
    return inputs.sin() * 2


LOCALIZATION = {
    "iou": LocalizationIoU,
    "rank": RelevanceRankAccuracy,
    "share": AttributionLocalization,
    "pointing": lambda **k: PointingGame(tolerance=1, **k),
    "auroc": AttributionAUROC,
}
BY_FORWARD = {
    "degradation": lambda **k: DegradationScore(steps=5, perturbation=HOW, **k),
    "degradation, summed": lambda **k: DegradationScore(steps=5, perturbation=HOW, reduction="sum", **k),
    "aopc": lambda **k: RegionPerturbation(steps=4, perturbation=HOW, **k),
    "deletion": lambda **k: RegionPerturbation("deletion", perturbation=HOW, **k),
    "insertion": lambda **k: RegionPerturbation("insertion", perturbation=HOW, **k),
    "faithfulness": lambda **k: FaithfulnessCorrelation(draws=6, share=0.2, **k),
    "infidelity": lambda **k: Infidelity(draws=4, **k),
    "sensitivity": lambda **k: Sensitivity(draws=3, **k),
}
EVERY = {**LOCALIZATION, **BY_FORWARD}


def update(name, metric, rows):
    x, maps, masks, target = (part[rows] for part in data())
    if name in LOCALIZATION:
        metric.update(maps, masks, target)
    elif name == "sensitivity":
        metric.update(explain, x, target)
    else:
        metric.update(network(), x, maps, target)
    return metric


@pytest.mark.parametrize("name", EVERY)
def test_no_split_into_batches_changes_the_value_and_classes_add_up(name):
    whole = update(name, EVERY[name](num_classes=CLASSES, per_class=True), slice(0, 11))
    parts = EVERY[name](num_classes=CLASSES, per_class=True)
    for rows in (slice(0, 3), slice(3, 3), slice(3, 4), slice(4, 11)):
        update(name, parts, rows)
    torch.testing.assert_close(parts.compute(), whole.compute())
    by_class = whole.compute()
    assert by_class.score.shape == (CLASSES,)
    assert int(by_class.samples.sum()) == 11
    target = data()[3]
    for number in range(CLASSES):
        own = update(name, EVERY[name](num_classes=CLASSES), (target == number).nonzero()[:, 0]).compute()
        torch.testing.assert_close(own.score, by_class.score[number])
    together = update(name, EVERY[name](num_classes=CLASSES), slice(0, 11)).compute()
    if "degradation" in name:
        torch.testing.assert_close(together.score, by_class.score.mean())
    else:
        mean = (by_class.score * by_class.samples).sum() / by_class.samples.sum()
        torch.testing.assert_close(together.score, mean)
        torch.testing.assert_close(update(name, EVERY[name](), slice(0, 11)).compute().score, mean)


def test_values_are_those_of_the_functions():
    x, maps, masks, target = data()
    model = network()
    found = {name: update(name, make(), slice(0, 11)).compute() for name, make in EVERY.items()}
    torch.testing.assert_close(found["iou"].score, localization_iou(maps, masks).score.mean())
    wanted = faithfulness_correlation(model, x, maps, target, draws=6, share=0.2).mean()
    torch.testing.assert_close(found["faithfulness"].score, wanted)
    torch.testing.assert_close(found["infidelity"].score, infidelity(model, x, maps, target, draws=4).mean())
    torch.testing.assert_close(found["sensitivity"].score, sensitivity(explain, x, target, draws=3).mean())
    curves = perturbation_curve(model, x, maps, target, perturbation=HOW, steps=6)
    torch.testing.assert_close(found["deletion"].score, torch.trapezoid(curves).mean() / 6)
    torch.testing.assert_close(found["aopc"].score, torch.trapezoid(curves[:, :1] - curves[:, :5]).mean() / 4)
    least = perturbation_curve(model, x, maps, target, perturbation=HOW, steps=6, order="least")
    torch.testing.assert_close(found["insertion"].score, torch.trapezoid(least.flip(1)).mean() / 6)
    random = perturbation_curve(model, x, random_attributions(x), target, perturbation=HOW, steps=6)
    torch.testing.assert_close(found["deletion"].random, torch.trapezoid(random).mean() / 6)


def test_insertion_goes_from_an_empty_input_to_the_whole_one_however_many_patches_there_are():
    x, _, _, target = data(3)
    metric = RegionPerturbation("insertion", perturbation=Perturbation(1, "zero"), baseline=False)
    long = x.repeat(1, 1, 6)  # 144 patches, more than the hundred steps of the published area

    def forward(inputs):  # its class is as sure as the input is whole
        kept = (inputs != 0).flatten(1).double().mean(1)
        return torch.stack([kept, 1 - kept, 0 * kept], 1).clamp_min(1e-300).log()

    metric.update(forward, long, long, 0 * target)
    assert metric.compute().score.item() == pytest.approx(0.5)


def test_degradation_scales_the_mean_curves_of_each_class():
    x, maps, _, target = data()
    own = []
    for number in range(CLASSES):
        rows = target == number
        least, most = (
            perturbation_curve(
                network(),
                x[rows],
                maps[rows],
                target[rows],
                perturbation=HOW,
                order=order,
                steps=CurveSteps(count=5, spread=True),
            ).mean(0)
            for order in ("least", "most")
        )
        own.append(degradation_score(least, most, reduction="sum"))
    found = update("degradation", BY_FORWARD["degradation, summed"](num_classes=CLASSES, per_class=True), slice(0, 11))
    torch.testing.assert_close(found.compute().score, torch.stack(own))
    assert found.scaled_curves().shape == (2, CLASSES, 6)


def test_skill_places_scores_between_random_and_best():
    maps, masks = torch.arange(10.0).expand(2, 10), torch.arange(10).expand(2, 10) > 6
    for kind in (LocalizationIoU, RelevanceRankAccuracy, PointingGame, AttributionAUROC):
        metric = kind()
        metric.update(maps, masks)
        assert metric.compute().skill.item() == pytest.approx(1)
        metric.reset()
        metric.update(0 * maps, masks)
        assert metric.compute().skill.item() == pytest.approx(0, abs=1e-7)
    perfect = Infidelity()
    x = torch.randn(3, 1, 8)
    perfect.update(lambda v: torch.stack([v.sum((1, 2)), 0 * v.sum((1, 2))], 1), x, 0 * x + 1, torch.zeros(3).long())
    assert perfect.compute().skill.item() == pytest.approx(1, abs=1e-4)


def test_a_flat_class_has_no_degradation_and_is_counted():
    def forward(inputs):  # says the same of everything, whatever is replaced, unless the first number is positive
        moved = torch.where(inputs[:, 0, :1] > 0, inputs[:, 0], 0)
        return torch.stack([moved.sum(1), 0 * moved.sum(1)], 1)

    x = torch.cat([torch.rand(2, 1, 8) + 0.5, -torch.rand(3, 1, 8) - 0.5])
    target = torch.tensor([0, 0, 1, 1, 1])
    metric = DegradationScore(2, steps=2, perturbation=Perturbation(4, "min"), per_class=True)
    metric.update(forward, x, x, target)
    result = metric.compute()
    assert result.score.isnan().tolist() == [False, True]
    assert result.samples.tolist() == [2, 0]
    assert result.undefined.tolist() == [0, 3]


def test_samples_without_a_score_are_counted_apart():
    maps, masks = torch.rand(4, 6), torch.ones(4, 6)
    masks[:, :3], masks[0], maps[1, 1] = 0, 0, math.nan
    metric = LocalizationIoU()
    metric.update(maps, masks)
    result = metric.compute()
    assert (int(result.samples), int(result.undefined)) == (2, 2)
    torch.testing.assert_close(result.score, localization_iou(maps[2:], masks[2:]).score.mean().double())
    empty = LocalizationIoU(num_classes=2, per_class=True)
    empty.update(maps[2:], masks[2:], torch.zeros(2).long())
    assert empty.compute().score.isnan().tolist() == [False, True]


@pytest.mark.parametrize("name", EVERY)
def test_forward_resets_and_survives_inference_mode(name):
    metric = EVERY[name]()
    with torch.inference_mode():
        update(name, metric, slice(0, 4))
    update(name, metric, slice(4, 11))
    torch.testing.assert_close(metric.compute(), update(name, EVERY[name](), slice(0, 11)).compute())
    metric.reset()
    update(name, metric, slice(0, 5))
    torch.testing.assert_close(metric.compute(), update(name, EVERY[name](), slice(0, 5)).compute())


def _rank(rank, bounds):
    values = {}
    for name, make in EVERY.items():
        metric = make(num_classes=CLASSES, per_class=True)
        update(name, metric, slice(bounds[rank], bounds[rank + 1]))
        values[name] = metric.compute()
    return values


@pytest.mark.distributed
@pytest.mark.parametrize("bounds", [(0, 3, 11), (0, 4, 4, 11)], ids=["two", "three, one of them without samples"])
def test_unequal_ranks_equal_one_process(bounds, tmp_path):
    expected = _rank(0, (0, 11))
    for values in run_on_ranks(_rank, len(bounds) - 1, tmp_path, bounds):
        torch.testing.assert_close(values, expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LocalizationIoU(per_class=True), ValueError, "`per_class=True` needs `num_classes`"),
        (lambda: DegradationScore(per_class=True), ValueError, "`per_class=True` needs `num_classes`"),
        (lambda: LocalizationIoU(num_classes=0), ValueError, "`num_classes` must be at least 1"),
        (lambda: PointingGame(tolerance=1.0), TypeError, "`tolerance` must be an int .* did you mean 1"),
        (
            lambda: LocalizationIoU(num_classes=2).update(torch.rand(2, 4), torch.ones(2, 4)),
            ValueError,
            "`classes` must be given to a metric with `num_classes=2`",
        ),
        (
            lambda: LocalizationIoU(num_classes=2).update(torch.rand(2, 4), torch.ones(2, 4), torch.tensor([0, 2])),
            ValueError,
            "`classes` must be in 0 to 1, the classes of `num_classes=2`, got 0 to 2",
        ),
        (
            lambda: LocalizationIoU(num_classes=2).update(torch.rand(2, 4), torch.ones(2, 4), torch.ones(2)),
            TypeError,
            "`classes` must be a tensor of integers",
        ),
        (lambda: DegradationScore(steps=0), ValueError, "`steps` must be at least 1"),
        (lambda: DegradationScore(reduction="max"), ValueError, "`reduction` must be 'sum' or 'mean'"),
        (lambda: RegionPerturbation("delete"), ValueError, "`kind` must be .* did you mean 'deletion'"),
        (lambda: RegionPerturbation("deletion", order="least"), ValueError, "`order='least'` is for `kind='aopc'`"),
        (
            lambda: RegionPerturbation("insertion", steps=100),
            ValueError,
            "`steps` of `kind='insertion'` are all patches",
        ),
        (
            lambda: update("aopc", RegionPerturbation(num_classes=2), slice(0, 11)),
            ValueError,
            "`target` must be in 0 to 1, the classes of `num_classes=2`, got 0 to 2",
        ),
        (
            lambda: update("degradation", DegradationScore(2), slice(0, 11)),
            ValueError,
            "`target` must be in 0 to 1, the classes of `num_classes=2`, got 0 to 2",
        ),
        (lambda: FaithfulnessCorrelation(share=2.0), ValueError, "`share` must be in"),
        (lambda: Sensitivity(draws=0), ValueError, "`draws` must be at least 1"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
