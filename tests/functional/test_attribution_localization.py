"""Localization scores against NumPy, against stored values of Quantus, and where definitions are delicate."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from lightning_plugins.functional.attribution import (
    attribution_auroc,
    attribution_localization,
    beat_spans,
    boxes_to_mask,
    localization_iou,
    pointing_game,
    relevance_rank_accuracy,
    spans_to_mask,
    top_k_intersection,
)

SCORES = [localization_iou, relevance_rank_accuracy, attribution_localization, pointing_game, attribution_auroc]
ORACLE = json.loads((Path(__file__).parent / "attribution_oracle.json").read_text(encoding="utf-8"))


def expected_hits(a, m, n):
    """Mean hits among the ``n`` first over many random orders that respect the values, by enumeration of ties."""
    value = np.sort(a)[::-1][n - 1]
    sure, tied = a > value, a == value
    return (sure & m).sum() + (tied & m).sum() * (n - sure.sum()) / tied.sum()


def reference(score, a, m):
    """One sample in float64 NumPy."""
    n, length, positive = m.sum(), len(a), np.maximum(a, 0)
    if score is localization_iou:
        hits = expected_hits(a, m, n)
        return hits / (2 * n - hits)
    if score is relevance_rank_accuracy:
        return expected_hits(a, m, n) / n
    if score is attribution_localization:
        return positive[m].sum() / positive.sum() if positive.sum() > 0 else n / length
    if score is pointing_game:
        return m[a == a.max()].mean()
    return mannwhitneyu(a[m], a[~m]).statistic / (n * (length - n)) if n < length else math.nan


def sample(seed, length, ties):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=length)
    if ties:
        a = np.round(np.maximum(a, 0) * 2)  # as a ReLU leaves it: many zeros, few levels
    m = rng.random(length) < 0.4
    m[rng.integers(length)] = True
    return a, m


@pytest.mark.parametrize("score", SCORES, ids=lambda f: f.__name__)
@given(seed=st.integers(0, 2**31), length=st.integers(2, 40), ties=st.booleans())
def test_equals_numpy_in_float64(score, seed, length, ties):
    a, m = sample(seed, length, ties)
    found = score(torch.tensor(a)[None], torch.tensor(m)[None])
    wanted = torch.tensor([reference(score, a, m)], dtype=torch.float64)
    torch.testing.assert_close(found.score, wanted, equal_nan=True)
    share = m.mean()
    random = {localization_iou: share / (2 - share), attribution_auroc: 0.5 if share < 1 else math.nan}
    wanted = torch.tensor([random.get(score, share)], dtype=torch.float64)
    torch.testing.assert_close(found.random, wanted, equal_nan=True)


@given(seed=st.integers(0, 2**31), length=st.integers(2, 40), ties=st.booleans())
def test_top_k_equals_numpy_in_float64(seed, length, ties):
    a, m = sample(seed, length, ties)
    k = 1 + seed % length
    found = top_k_intersection(torch.tensor(a)[None], torch.tensor(m)[None], k)
    torch.testing.assert_close(found.score, torch.tensor([expected_hits(a, m, k) / k], dtype=torch.float64))
    torch.testing.assert_close(found.random, torch.tensor([m.mean()], dtype=torch.float64))


@pytest.mark.parametrize("score", SCORES, ids=lambda f: f.__name__)
def test_a_constant_map_gives_the_baseline(score):
    masks = torch.zeros(3, 10)
    masks[0, :1], masks[1, 2:7], masks[2, :9] = 1, 1, 1
    for value in (0.0, -3.0, 2.5):
        found = score(torch.full((3, 10), value), masks)
        torch.testing.assert_close(found.score, found.random)


@pytest.mark.parametrize("score", SCORES, ids=lambda f: f.__name__)
@given(seed=st.integers(0, 2**31), length=st.integers(2, 30))
def test_no_order_of_positions_matters_and_shares_stay_in_range(score, seed, length):
    a, m = sample(seed, length, ties=True)
    order = np.random.default_rng(seed + 1).permutation(length)
    found, moved = (
        score(torch.tensor(part)[None], torch.tensor(mask)[None]).score for part, mask in ((a, m), (a[order], m[order]))
    )
    torch.testing.assert_close(found, moved, equal_nan=True)
    assert bool((found.isnan() | ((found >= 0) & (found <= 1))).all())


def test_ties_are_the_mean_over_random_orders():
    a, m = torch.tensor([2.0, 1, 1, 1, 1, 0]), torch.tensor([0, 1, 0, 0, 1, 1])
    generator, hits = torch.Generator().manual_seed(0), []
    for _ in range(4000):
        jitter = 0.1 * torch.rand(6, generator=generator)
        hits.append(m[(a + jitter).topk(3).indices].sum() / 3)
    found = relevance_rank_accuracy(a[None], m[None]).score[0]
    torch.testing.assert_close(found, torch.stack(hits).mean(), atol=0.01, rtol=0)


@pytest.mark.parametrize("score", SCORES, ids=lambda f: f.__name__)
def test_empty_masks_and_maps_that_are_not_finite_have_no_score(score):
    maps, masks = torch.rand(4, 6), torch.ones(4, 6)
    masks[:, :3] = 0
    masks[0] = 0
    maps[1, 2], maps[2, 0] = math.nan, math.inf
    found = score(maps, masks)
    assert found.score.isnan().tolist() == [True, True, True, False]
    assert found.random.isnan().tolist() == [True, True, True, False]


def test_full_masks():
    maps, masks = torch.randn(2, 6), torch.ones(2, 6)
    for score in (localization_iou, relevance_rank_accuracy, attribution_localization, pointing_game):
        torch.testing.assert_close(score(maps, masks).score, torch.ones(2))
    assert attribution_auroc(maps, masks).score.isnan().all()


def test_channels_are_summed_and_space_may_have_any_dimensions():
    maps, masks = torch.randn(3, 2, 4, 5, 6), torch.rand(3, 4, 5, 6) < 0.3
    for score in SCORES:
        wanted = score(maps.sum(1).reshape(3, -1), masks.reshape(3, -1)).score
        torch.testing.assert_close(score(maps, masks).score, wanted)
        torch.testing.assert_close(score(maps, masks[:, None]).score, wanted)
        torch.testing.assert_close(score(maps.sum(1), masks[:, None]).score, wanted)


def test_tolerance_widens_along_every_dimension():
    maps, masks = torch.zeros(1, 5, 5), torch.zeros(1, 5, 5)
    maps[0, 1, 1], masks[0, 3, 3] = 1, 1
    assert [pointing_game(maps, masks, tolerance=t).score.item() for t in (0, 1, 2)] == [0, 0, 1]
    assert pointing_game(maps, masks, tolerance=1).random.item() == pytest.approx(9 / 25)


def test_half_precision_and_huge_values():
    maps, masks = torch.rand(4, 50), torch.rand(4, 50) < 0.4
    for score in SCORES:
        torch.testing.assert_close(score(maps.half(), masks).score, score(maps.half().float(), masks).score)
        assert score(1e37 * maps, masks).score.isfinite().all()


@pytest.mark.parametrize("score", [*SCORES, lambda a, m: top_k_intersection(a, m, 400)])
def test_a_default_dtype_of_half_precision_changes_nothing(score):
    """Lightning's `16-true` makes it the default: quotients of counts would be rounded, and above 65,504 infinite."""
    maps, masks = torch.rand(2, 1000).mul(8).round(), torch.rand(2, 1000) < 0.4
    wanted = score(maps, masks)
    torch.set_default_dtype(torch.half)
    try:
        found = score(maps, masks)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, wanted)


def test_equals_quantus_where_definitions_meet():
    from tools.attribution_oracle import data

    _, maps, masks = (torch.from_numpy(part) for part in data())
    for name, found in {
        "attribution_localization": attribution_localization(maps, masks),
        "rank_accuracy": relevance_rank_accuracy(maps, masks),
        "pointing_game": pointing_game(maps, masks),
        "auroc": attribution_auroc(maps, masks),
        "top_10": top_k_intersection(maps, masks, 10),
    }.items():
        wanted = torch.tensor(ORACLE[name])
        torch.testing.assert_close(found.score, wanted, msg=lambda text, name=name: f"{name}: {text}")


def test_weighted_shares_are_in_units_of_a_constant_map():
    maps, masks = torch.tensor([[3.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]), torch.tensor([[1, 0, 0, 0]] * 2)
    found = attribution_localization(maps, masks, weighted=True)
    torch.testing.assert_close(found.score, torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(found.random, torch.ones(2))


def test_signed_and_negative_maps_keep_their_range():
    maps, masks = torch.tensor([[-1.0, -2.0, -3.0, -0.5], [4.0, -9.0, 1.0, 0.0]]), torch.tensor([[1, 0, 0, 0]] * 2)
    torch.testing.assert_close(attribution_localization(maps, masks).score, torch.tensor([0.25, 0.8]))


def test_spans_of_beats_meet_in_the_middle():
    spans = beat_spans(torch.tensor([5, 12, 30]), torch.tensor([1, 0, 1]), 40)
    assert {label: value.tolist() for label, value in spans.items()} == {0: [[8, 21]], 1: [[0, 8], [21, 40]]}
    mask = spans_to_mask(spans[1], 40)
    assert mask.tolist() == [not 8 <= i < 21 for i in range(40)]
    assert spans_to_mask([], 3).tolist() == [False] * 3
    assert beat_spans(torch.tensor([7]), torch.tensor([0]), 10)[0].tolist() == [[0, 10]]
    assert beat_spans(torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.long), 10) == {}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: localization_iou(torch.rand(2, 5), torch.ones(2, 6)), ValueError, r"`masks` must have .*\(2, 6\)"),
        (lambda: localization_iou(torch.rand(2, 5), torch.ones(3, 5)), ValueError, "`masks` must have the shape"),
        (lambda: localization_iou(torch.ones(2, 5).long(), torch.ones(2, 5)), TypeError, "`attributions` must be a f"),
        (lambda: localization_iou(torch.rand(5), torch.ones(5)), ValueError, r"`attributions` must have shape \(B"),
        (lambda: localization_iou(torch.rand(2, 5), [[1]]), TypeError, "`masks` must be a tensor, got list; `spans_to"),
        (lambda: pointing_game(torch.rand(2, 5), torch.ones(2, 5), tolerance=-1), ValueError, "`tolerance` must be at"),
        (lambda: top_k_intersection(torch.rand(2, 5), torch.ones(2, 5), 6), ValueError, "`k` must be at most .*, 5"),
        (lambda: spans_to_mask([(3, 12)], 10), ValueError, r"`spans` must have .*, got \[3\] to \[12\]"),
        (lambda: spans_to_mask([(-1, 2)], 10), ValueError, "`spans` must have 0 <= first"),
        (lambda: spans_to_mask([(4, 4)], 10), ValueError, "`spans` must have 0 <= first < one beyond"),
        (lambda: spans_to_mask([(0.5, 2.0)], 10), TypeError, "`spans` must be of integers"),
        (lambda: boxes_to_mask([(0, 0, 2)], (4, 4)), ValueError, r"`boxes` must have shape \(m, 4\)"),
        (lambda: beat_spans(torch.tensor([3, 9]), torch.tensor([0]), 10), ValueError, "`labels` must have shape"),
        (lambda: beat_spans(torch.tensor([9, 3]), torch.tensor([0, 0]), 10), ValueError, "`r_peaks` must rise"),
        (lambda: beat_spans(torch.tensor([3, 10]), torch.tensor([0, 0]), 10), ValueError, "`r_peaks` must lie within"),
        (lambda: beat_spans(torch.tensor([3.0]), torch.tensor([0]), 10), TypeError, "`r_peaks` must be a tensor of i"),
    ],
)
def test_bad_inputs_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
