"""Cells in bird's-eye view give what a look at every point gives; free places are those of the separating axes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_plugins.functional import bev_overlap, ground_height, points_in_boxes
from lightning_plugins.transforms.places import BirdsEye, first_free

SEEDS = st.integers(0, 2**31)


def boxes_of(rng, count, spread):
    return torch.from_numpy(
        np.column_stack(
            [rng.uniform(-spread, spread, (count, 3)), rng.uniform(0, 6, (count, 3)), rng.uniform(-4, 4, count)]
        )
    ).float()


def cloud_of(rng, dtype=np.float32):
    points = rng.normal(0, rng.choice([2, 30, 200]), (int(rng.integers(0, 3000)), 4))
    points[:, 2] = 0.03 * points[:, 0] + rng.normal(0, 0.05, len(points))
    points[rng.random(len(points)) < 0.01, rng.integers(3)] = rng.choice([np.nan, np.inf, -np.inf, 1e9])
    return torch.from_numpy(points.astype(dtype))


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_points_in_boxes_are_all_found(seed):
    rng = np.random.default_rng(seed)
    points, boxes = cloud_of(rng), boxes_of(rng, int(rng.integers(0, 8)), 60)
    wanted = points_in_boxes(points, boxes).any(1)
    assert torch.equal(BirdsEye(points).inside(boxes), wanted)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, dtype=st.sampled_from([np.float32, np.float64]))
def test_ground_is_that_of_the_fit_for_each_place(seed, dtype):
    rng = np.random.default_rng(seed)
    points, places = cloud_of(rng, dtype), rng.uniform(-40, 40, (6, 2))
    found = torch.from_numpy(BirdsEye(points).ground(places))
    known = points[points.isfinite().all(1)].double()
    wanted = torch.stack([ground_height(known, torch.from_numpy(place)[None])[0] for place in places])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6, equal_nan=True)


def test_no_place_and_no_point():
    nothing = BirdsEye(torch.zeros(0, 4))
    assert nothing.inside(torch.ones(2, 7)).tolist() == []
    assert np.isnan(nothing.ground(np.zeros((2, 2)))).all()
    assert BirdsEye(torch.ones(3, 4)).inside(torch.zeros(0, 7)).tolist() == [False] * 3
    assert BirdsEye(torch.ones(3, 4)).ground(np.zeros((0, 2))).shape == (0,)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, taken=st.integers(0, 30), spread=st.sampled_from([4.0, 12.0, 40.0]))
def test_the_first_free_box_is_that_of_the_separating_axes(seed, taken, spread):
    rng = np.random.default_rng(seed)
    boxes, others = boxes_of(rng, 20, spread), boxes_of(rng, taken, spread)
    free = (~bev_overlap(boxes, others).any(1)).nonzero().flatten().tolist()
    assert first_free(boxes, list(others)) == (free[0] if free else None)


@pytest.mark.parametrize("gap", [-0.01, 0.01])
def test_boxes_side_by_side_inside_each_others_circles(gap):
    one = torch.tensor([0.0, 0.0, 0.0, 4.0, 2.0, 2.0, 0.5])
    across = one[6] + torch.pi / 2
    beside = one + torch.stack([across.cos(), across.sin(), *torch.zeros(5)]) * (2 + gap)
    assert first_free(one[None], [beside]) == (0 if gap > 0 else None)
