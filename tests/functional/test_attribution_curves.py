"""Perturbation curves against NumPy and Quantus; chunks, ties and refusals."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

from lightning_plugins.functional.attribution import (
    CurveSteps,
    NoiseDraws,
    Perturbation,
    class_scores,
    curve_area,
    degradation_score,
    faithfulness_correlation,
    infidelity,
    parameter_randomization,
    perturbation_curve,
    scaled_curve,
    sensitivity,
)
from lightning_plugins.functional.attribution.random import random_normal, sample_keys
from lightning_plugins.functional.attribution.replacement import REPLACEMENTS, Patches, blurred, replacements

ORACLE = json.loads((Path(__file__).parent / "attribution_oracle.json").read_text(encoding="utf-8"))
LENGTH, PATCH = 22, 4  # the last window is shorter


def network(channels=1, length=LENGTH):
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * length, 6), nn.ReLU(), nn.Linear(6, 3)).double().eval()


def batch(rows=5, channels=1):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, channels, LENGTH, generator=generator, dtype=torch.float64)
    maps = torch.randn(rows, channels, LENGTH, generator=generator, dtype=torch.float64)
    return x, maps, torch.arange(rows) % 3


def replaced_by_hand(x, window, rule, state, least):
    """One window of one channel, in NumPy; lines read the neighbours from ``state``."""
    a, b = window
    if rule in {"zero", "constant"}:
        return np.zeros(b - a) if rule == "zero" else np.full(b - a, 0.7)
    if rule == "mean":
        return np.full(b - a, x[a:b].mean())
    if rule == "min":
        return np.full(b - a, least)
    left, right = (state[a - 1] if a else state[b]), (state[b] if b < len(x) else state[a - 1])
    return left + (right - left) * np.arange(1, b - a + 1) / (b - a + 1)


def curve_by_hand(model, x, a, target, rule, *, order, sequential):
    windows = [(s, min(s + PATCH, LENGTH)) for s in range(0, LENGTH, PATCH)]
    sums = np.array([a.sum(0)[s:e].sum() for s, e in windows])
    places = np.argsort(-sums if order == "most" else sums, kind="stable")
    state, original, points = x.copy(), x.copy(), []
    for step in range(len(windows) + 1):
        if step:
            s, e = windows[places[step - 1]]
            for channel in range(len(x)):
                source = state if sequential else original
                state[channel, s:e] = replaced_by_hand(original[channel], (s, e), rule, source[channel], original.min())
        with torch.no_grad():
            points.append(model(torch.tensor(state)[None]).softmax(1)[0, target].item())
    return points


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("order", ["most", "least"])
@pytest.mark.parametrize("rule", ["zero", "constant", "mean", "min", "linear", "sequential"])
def test_curve_equals_numpy(rule, order, channels):
    (x, maps, target), model = batch(channels=channels), network(channels)
    kind, sequential = ("linear", True) if rule == "sequential" else (rule, False)
    how = Perturbation(PATCH, kind, sequential=sequential, value=0.7 if kind == "constant" else 0.0)
    found = perturbation_curve(model, x, maps, target, perturbation=how, order=order, max_forward_batch=7)
    rows = zip(x.numpy(), maps.numpy(), target.tolist(), strict=True)
    wanted = [curve_by_hand(model, a, b, t, kind, order=order, sequential=sequential) for a, b, t in rows]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(2, 40), (2, 9, 13)], ids=str)
def test_blur_equals_scipy(shape):
    x = torch.randn(3, *shape, dtype=torch.float64)
    wanted = [[gaussian_filter(channel.numpy(), 2.0, mode="nearest", radius=6) for channel in sample] for sample in x]
    torch.testing.assert_close(blurred(x, 2.0), torch.tensor(np.array(wanted)))


def test_noise_is_that_of_the_sample_about_the_mean_or_within_its_range():
    x = torch.randn(3, 2, LENGTH, dtype=torch.float64)
    keys, patches = sample_keys(x), Patches((LENGTH,), PATCH, x.device)
    noise = random_normal(keys, 2 * LENGTH, seed=5).reshape(x.shape)
    found = replacements(x, Perturbation(PATCH, "gaussian", value=0.3, seed=5), patches, keys)
    means = [np.repeat(row[s : s + PATCH].mean(), len(row[s : s + PATCH])) for row in x.numpy().reshape(6, -1)
             for s in range(0, LENGTH, PATCH)]  # fmt: skip
    torch.testing.assert_close(found, torch.tensor(np.concatenate(means)).reshape(x.shape) + 0.3 * noise.double())
    found = replacements(x, Perturbation(PATCH, "uniform"), patches, keys)
    low, high = x.flatten(1).amin(1)[:, None, None], x.flatten(1).amax(1)[:, None, None]
    assert bool(((found >= low) & (found <= high)).all())
    assert found.std() > 0.5
    made = replacements(x, Perturbation(PATCH, lambda inputs: 2 * inputs), patches, keys)
    torch.testing.assert_close(made, 2 * x)


def test_sequential_lines_differ_from_those_of_the_original():
    (x, maps, target), model = batch(), network()
    both = [
        perturbation_curve(model, x, maps, target, perturbation=Perturbation(PATCH, "linear", sequential=s))
        for s in (False, True)
    ]
    assert (both[0] - both[1]).abs().max() > 1e-3


@pytest.mark.parametrize("rule", [*REPLACEMENTS, "callable", "sequential"])
def test_neither_chunks_nor_batches_nor_order_change_a_curve(rule):
    (x, maps, target), model = batch(rows=6), network()
    replacement = (lambda inputs: 0.5 * inputs.flip(-1)) if rule == "callable" else rule
    how = Perturbation(PATCH, "linear" if rule == "sequential" else replacement, sequential=rule == "sequential")
    settings = {"perturbation": how, "steps": CurveSteps(count=5, spread=True)}
    whole = perturbation_curve(model, x, maps, target, max_forward_batch=10_000, **settings)
    for limit in (1, 4, 13):
        parts = perturbation_curve(model, x, maps, target, max_forward_batch=limit, **settings)
        torch.testing.assert_close(parts, whole)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    mixed = [
        perturbation_curve(model, x[rows], maps[rows], target[rows], **settings) for rows in order.split([1, 3, 2])
    ]
    torch.testing.assert_close(torch.cat(mixed), whole[order])


def test_region_perturbation_equals_quantus():
    from tools.attribution_oracle import data, network

    x, maps, _ = (torch.from_numpy(part) for part in data())
    for name, order in (("morf", "most"), ("lerf", "least")):
        curve = perturbation_curve(
            network(), x, maps, torch.tensor([0, 1, 1, 0]), perturbation=Perturbation(8, "min"), order=order
        )
        wanted = torch.tensor(ORACLE[f"region_perturbation_{name}"])
        torch.testing.assert_close((curve[:, :1] - curve)[:, 1:], wanted, rtol=1e-5, atol=1e-6)


def test_equal_patches_go_in_an_order_of_the_sample_and_a_constant_map_degrades_nothing():
    (x, _, target), model = batch(), network()
    flat = torch.zeros(5, LENGTH, dtype=torch.float64)
    most, least = (
        perturbation_curve(model, x, flat, target, perturbation=Perturbation(PATCH), order=order)
        for order in ("most", "least")
    )
    torch.testing.assert_close(most, least, rtol=0, atol=0)
    other = perturbation_curve(model, x, flat, target, perturbation=Perturbation(PATCH, seed=1))
    assert (other - most).abs().max() > 1e-3


def test_maps_that_are_not_finite_give_nan_and_steps_beyond_the_patches_repeat():
    (x, maps, target), model = batch(), network()
    maps[2, 0, 3] = math.nan
    curve = perturbation_curve(model, x, maps, target, perturbation=Perturbation(PATCH), steps=9)
    assert curve.isnan().all(1).tolist() == [False, False, True, False, False]
    torch.testing.assert_close(curve[0, 6:], curve[0, 6].expand(4))


def test_images_of_any_size():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * 5 * 7, 2)).eval()
    x, maps = torch.randn(3, 2, 5, 7), torch.randn(3, 5, 7)
    for rule in ("zero", "mean", "blur", "uniform", "gaussian"):
        curve = perturbation_curve(model, x, maps, torch.zeros(3).long(), perturbation=Perturbation(3, rule))
        assert curve.shape == (3, 7)
        assert curve.isfinite().all()


def test_scaled_curves_and_flat_ones():
    most, least = torch.tensor([0.9, 0.3, 0.1]).double(), torch.tensor([0.9, 0.8, 0.1]).double()
    wanted = ((least - 0.1) / 0.8 - (most - 0.1) / 0.8).sum()
    torch.testing.assert_close(degradation_score(least, most, reduction="sum"), wanted)
    torch.testing.assert_close(degradation_score(least, most), wanted / 3)
    assert scaled_curve(torch.tensor([0.5, 0.2, 0.5])).isnan().all()
    torch.testing.assert_close(curve_area(torch.tensor([1.0, 0.5, 0.0, 0.0])), torch.tensor(1.0 / 3))


X, MAPS, Y = torch.rand(2, 1, 8), torch.rand(2, 1, 8), torch.tensor([0, 1])


def flat_forward(inputs):
    return inputs.flatten(1)[:, :2]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Perturbation(patch=0), ValueError, "`patch` must be at least 1"),
        (lambda: Perturbation(replacement="maen"), ValueError, "`replacement` must be .*did you mean 'mean'"),
        (lambda: Perturbation(sequential=True), ValueError, "`sequential` is for `replacement='linear'`"),
        (
            lambda: perturbation_curve(flat_forward, X, MAPS[:, :, :7], Y),
            ValueError,
            "`attributions` must have the pos",
        ),
        (lambda: perturbation_curve(flat_forward, X, MAPS, Y.float()), TypeError, "`target` must be a tensor of class"),
        (lambda: perturbation_curve(flat_forward, X, MAPS, Y[:1]), ValueError, r"`target` must have shape \(2,\)"),
        (lambda: perturbation_curve(flat_forward, X, MAPS, Y + 1), ValueError, "`target` must be in 0 to 1, the cla"),
        (lambda: perturbation_curve(flat_forward, X, MAPS, Y, order="morf"), ValueError, "`order` must be 'most' or"),
        (lambda: perturbation_curve(flat_forward, X, MAPS, Y, steps=0), ValueError, "`steps` must be at least 1"),
        (lambda: perturbation_curve(flat_forward, X, MAPS, Y, max_forward_batch=0), ValueError, "`max_forward_batch`"),
        (lambda: perturbation_curve(lambda x: x[:, 0, :1], X, MAPS, Y), ValueError, "`forward` gives no probabilities"),
        (lambda: perturbation_curve(lambda x: x, X, MAPS, Y), ValueError, r"`forward` must return logits of shape"),
        (
            lambda: class_scores(lambda x: 3, X, Y),
            TypeError,
            "`forward` must return a floating tensor of logits, got i",
        ),
        (
            lambda: perturbation_curve(flat_forward, X, MAPS, Y, perturbation=Perturbation(8, "linear")),
            ValueError,
            "`replacement='linear'` draws lines between windows",
        ),
        (
            lambda: perturbation_curve(flat_forward, X, MAPS, Y, perturbation=Perturbation(2, lambda x: x[:, :, :3])),
            ValueError,
            "`replacement` must keep the shape",
        ),
        (lambda: faithfulness_correlation(flat_forward, X, MAPS, Y, share=0), ValueError, "`share` must be above 0"),
        (lambda: faithfulness_correlation(flat_forward, X, MAPS, Y, share=10), ValueError, "did you mean 0.1"),
        (lambda: infidelity(flat_forward, X, MAPS[:, :, :5], Y), ValueError, "`attributions` must have the shape"),
        (lambda: NoiseDraws(count=0), ValueError, "`count` must be at least 1"),
        (lambda: infidelity(flat_forward, X, MAPS, Y, draws=0), ValueError, "`draws` must be at least 1"),
        (lambda: CurveSteps(count=0), ValueError, "`count` must be at least 1"),
        (lambda: CurveSteps(spread=1), TypeError, "`spread` must be True or False"),
        (lambda: NoiseDraws(std=0.0), ValueError, "`std` must be above 0"),
        (lambda: sensitivity(lambda x, y: x, X, Y, radius=-1.0), ValueError, "`radius` must be above 0"),
        (lambda: degradation_score(torch.ones(3), torch.ones(4)), ValueError, "`least` and `most` must have the same"),
        (lambda: parameter_randomization(nn.ReLU(), lambda x, y: x, X, Y), ValueError, "`model` must have parameters"),
    ],
)
def test_bad_inputs_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
