"""What a sensor gets back of an object, against exact scans."""

import numpy as np
import pytest
import torch

from lightning_plugins.data import Shape, SpinningSensor, scan
from lightning_plugins.transforms.occlusion import object_returns

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
        got = SENSOR.grid.cells(object_returns(cloud, SENSOR.grid)[0])[0].tolist()
        assert len(set(got)) == len(got)
        both, either, found = both + len(cells & set(got)), either + len(cells | set(got)), found + len(got)
    assert both / either >= 0.95
    assert found == pytest.approx(both, rel=0.05)
