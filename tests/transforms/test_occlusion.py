"""Returns of objects, against exact scans and against the slow form."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_plugins.data import ObjectBank, RaycastScenes, Shape, SpinningSensor, scan
from lightning_plugins.transforms import WholeBodyAugmentation
from lightning_plugins.transforms.frame import Frame
from lightning_plugins.transforms.returns import object_returns
from tests.transforms import slow_forms

SENSOR = SpinningSensor(beams=64, columns=2048, lowest=-24.0, highest=2.0, noise=0.0)
SIZE = np.array([4.2, 1.8, 1.55])


def surface(count, rng):
    """Points on the sides and the top of a cuboid, denser than any scan."""
    places = rng.uniform(-0.5, 0.5, (count, 3))
    axis = rng.integers(3, size=count)
    places[np.arange(count), axis] = np.where(axis == 2, 0.5, rng.choice([-0.5, 0.5], count))
    return np.column_stack([places * SIZE, np.zeros(count)])


def turned(points, angle, shift):
    cos, sin = np.cos(angle), np.sin(angle)
    moved = np.column_stack([points[:, 0] * cos - points[:, 1] * sin, points[:, 0] * sin + points[:, 1] * cos])
    return np.column_stack([moved + shift[:2], points[:, 2] + shift[2], points[:, 3:]])


@pytest.mark.parametrize("distance", [10.0, 20.0, 40.0, 60.0])
def test_an_object_is_met_by_the_beams_of_a_scan(distance):
    """Also where few beams meet it: there a point that fills too large a cell gives the object rows of its own."""
    rng, both, either, found = np.random.default_rng(0), 0, 0, 0
    for azimuth, yaw in rng.uniform(-3, 3, (12, 2)):
        place = (distance * np.cos(azimuth), distance * np.sin(azimuth), SIZE[2] / 2 - SENSOR.height)
        wanted = scan([Shape((*place, *SIZE, yaw))], SENSOR)
        cells = set(wanted.cells[wanted.hit == 0].tolist())
        cloud = torch.from_numpy(turned(surface(20_000, rng), yaw, place)).float()
        got = SENSOR.grid.cells(object_returns([cloud], SENSOR.grid)[0][0])[0].tolist()
        assert len(set(got)) == len(got)
        both, either, found = both + len(cells & set(got)), either + len(cells | set(got)), found + len(got)
    assert both / either >= 0.95
    assert found == pytest.approx(both, rel=0.05)


GRID = SpinningSensor(beams=16, columns=256).grid
SCENES = RaycastScenes(3, SpinningSensor(beams=16, columns=256), seed=0)
FRAMES = [SCENES[number] for number in range(3)]
BANK = ObjectBank.from_frames(FRAMES)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_returns_equal_those_of_one_object_after_the_other(seed):
    """Of clouds anywhere, across the seam of the azimuth, around the sensor, outside of the rows and empty."""
    rng = np.random.default_rng(seed)
    clouds = [
        torch.from_numpy(rng.normal(rng.uniform(-9, 9, 3) * (1, 1, 0.1), rng.uniform(0.1, 3, 3), (count, 3))).float()
        for count in rng.integers(0, 300, 5)
    ]
    clouds = [torch.cat([cloud, torch.rand(len(cloud), 1)], dim=1) for cloud in clouds]
    clouds.append(torch.tensor([[-9.0, -1.0, 0.0, 1.0], [-9.0, 1.0, -0.5, 2.0], [0.0, 0.0, 0.0, 3.0]]))
    clouds.append(torch.tensor([[1.0, 0.0, 99.0, 1.0]]))
    for cloud, (found, own) in zip(clouds, object_returns(clouds, GRID), strict=True):
        wanted, nearest, steps = slow_forms.object_returns(cloud, GRID)
        torch.testing.assert_close(found[:, :3], wanted[:, :3], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[:, 3:], cloud[own, 3:], rtol=0, atol=0)
        rows = torch.arange(len(own))
        assert torch.equal(steps[rows, own], steps[rows, nearest])  # of two as near either will do


def test_half_precision_gives_the_beams_of_single():
    """Of points that half precision holds; the fine cells of a turn are more than it can count."""
    rng = np.random.default_rng(0)
    cloud = torch.from_numpy(turned(surface(2000, rng), 0.4, (-8.0, 0.3, -1.0))).half()
    ((half, own),) = object_returns([cloud], SENSOR.grid)
    ((single, numbers),) = object_returns([cloud.float()], SENSOR.grid)
    assert half.dtype == torch.float16
    assert torch.equal(own, numbers)
    torch.testing.assert_close(half, single.half())
    assert len(half) > 1000


@pytest.mark.parametrize(("epoch", "dtype"), [(0, np.float32), (1, np.float64), (2, np.float32)])
def test_a_frame_is_augmented_as_by_one_object_after_the_other(epoch, dtype):
    near = ((3.0, 12.0), (-12.0, 12.0))
    augment = WholeBodyAugmentation(BANK, {"Car": 9, "Pedestrian": 8}, grid=GRID, area=near, seed=4)
    frame = {**FRAMES[epoch % 3], "points": FRAMES[epoch % 3]["points"].astype(dtype)}
    augment.set_epoch(epoch)
    fast, read = augment(frame), Frame.read(frame)
    rng, bodies = np.random.default_rng([4, epoch, frame["index"]]), []
    for label, target in augment.targets.items():
        for number in rng.choice(BANK.members(label), max(0, target - read.labels.count(label))):
            body = slow_forms.construct(BANK, int(number), augment.fill, rng)
            body = slow_forms.place(body, read, bodies, augment.area, rng)
            bodies += [] if body is None else [body]
    slow = slow_forms.insert(read, bodies, GRID)
    assert int((slow.source >= 0).sum()) > 100
    assert fast["labels"] == slow.labels
    torch.testing.assert_close(torch.from_numpy(fast["boxes"]), slow.boxes, rtol=0, atol=1e-4)
    assert abs(len(fast["points"]) - len(slow.points)) <= 2  # a point on the border of two cells
    if len(fast["points"]) == len(slow.points):
        np.testing.assert_allclose(fast["points"][:, :3], slow.points[:, :3], rtol=1e-4, atol=1e-3)
        assert np.array_equal(fast["source"] < 0, slow.source.numpy() < 0)
