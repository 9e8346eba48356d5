"""The device form: the same for a sample in any batch, and as the form for single frames where it can be compared."""

import math

import numpy as np
import pytest
import torch

from lightning_plugins.data import ObjectBank, RaycastScenes, SpinningSensor
from lightning_plugins.functional import RangeGrid, bev_overlap, points_in_boxes
from lightning_plugins.transforms import BatchAugmentation, collate_frames
from lightning_plugins.transforms.occlusion import TOLERANCE
from lightning_plugins.transforms.random_bits import uniform

SENSOR = SpinningSensor(beams=16, columns=256)
SCENES = RaycastScenes(4, SENSOR, seed=0)
FRAMES = [SCENES[number] for number in range(4)]
BANK = ObjectBank.from_frames(FRAMES)
AUGMENT = BatchAugmentation(BANK, {"Car": 9, "Pedestrian": 5}, grid=SENSOR.grid, max_points=200)


def batch_of(*numbers, indexed=True):
    frames = [{k: v for k, v in FRAMES[number].items() if indexed or k != "index"} for number in numbers]
    return collate_frames(frames, BANK.classes)


def contents(batch, row):
    """Points, boxes and labels of a sample, without padding."""
    used = batch["labels"][row] >= 0
    kept = batch["mask"][row]
    return batch["points"][row][kept], batch["source"][row][kept], batch["boxes"][row][used], batch["labels"][row][used]


@pytest.mark.parametrize("indexed", [True, False])
def test_a_sample_is_augmented_alike_in_any_batch(indexed):
    whole = AUGMENT(batch_of(0, 1, 2, indexed=indexed), step=5)
    for row, numbers in ((0, [0]), (1, [1]), (2, [2])):
        alone = AUGMENT(batch_of(*numbers, indexed=indexed), step=5)
        for one, other in zip(contents(whole, row), contents(alone, 0), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    again = AUGMENT(batch_of(0, indexed=indexed), step=6)
    assert contents(again, 0)[0].shape != contents(whole, 0)[0].shape


def test_objects_stand_free_on_the_ground_with_their_points():
    before, after = batch_of(0, 1, 2, 3), AUGMENT(batch_of(0, 1, 2, 3))
    for row in range(4):
        points, source, boxes, labels = contents(after, row)
        assert int(bev_overlap(boxes, boxes).sum()) == len(boxes)
        added = after["labels"][row, before["labels"].shape[1] :] >= 0
        new = after["boxes"][row, before["boxes"].shape[1] :][added]
        assert 0 < len(new) <= 14
        torch.testing.assert_close(new[:, 2] - new[:, 5] / 2, torch.full((len(new),), -1.73), atol=0.1, rtol=0)
        own = points_in_boxes(points[source >= 0], new + torch.tensor([0, 0, 0, 0.01, 0.01, 0.01, 0]))
        assert own.any(1).all()
        assert (own.sum(0) >= 5).all()
        assert not points_in_boxes(points[source < 0], new).any()
        cells = SENSOR.grid.cells(points[source >= 0])[0]
        assert cells.unique().numel() == cells.numel()  # one return on a beam
        for name, target in AUGMENT.targets.items():
            assert (labels == BANK.classes.index(name)).sum() <= max(target, FRAMES[row]["labels"].count(name))


def test_padding_of_an_object_gives_no_points():
    # Both ends of a car have points and its middle has none: there a row of padding, zeros, would stand.
    ends = torch.tensor([-1.9, 1.9])[:, None, None] + torch.zeros(2, 300, 4)
    ends[..., 1:3] = torch.rand(2, 300, 2, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    car = {"points": ends.flatten(0, 1).numpy(), "boxes": np.array([[0, 0, 0, 4, 1.8, 1.8, 0]]), "labels": ["Car"]}
    bank, near = ObjectBank.from_frames([car]), ((6.0, 12.0), (-12.0, 12.0))
    augment = BatchAugmentation(bank, {"Car": 9}, grid=SENSOR.grid, area=near, max_points=2000)
    batch = collate_frames([{"points": np.zeros((1, 4)), "boxes": np.zeros((0, 7)), "labels": []}], bank.classes)
    for step in range(20):
        points, source, boxes, _ = contents(augment(batch, step=step), 0)
        assert len(boxes) > 1
        assert torch.cdist(points[source >= 0, :3], boxes[:, :3]).min() > 1


def test_what_stands_behind_an_object_goes():
    batch, result = batch_of(1), AUGMENT(batch_of(1))
    count = batch["points"].shape[1]
    lost = batch["points"][0][batch["mask"][0] & ~result["mask"][0, :count]]
    assert 0 < len(lost) < 0.5 * count
    assert torch.equal(result["points"][0, :count], batch["points"][0])


def test_a_point_exactly_the_tolerance_behind_an_object_is_still_seen():
    """Two points stand left and right of a beam, and the gap between them is closed; the third is on the beam."""
    grid = RangeGrid(rows=2, columns=64, lowest=-0.3, highest=0.9)
    augment = BatchAugmentation(BANK, {"Car": 9}, grid=grid)
    angle = torch.tensor([-0.5, 3.5, 0.0]) * 2 * math.pi / (3 * grid.columns)
    cloud = torch.stack([10 * angle.cos(), 10 * angle.sin(), 0 * angle, 0 * angle], dim=1)
    valid = torch.ones(1, 1, 3, dtype=torch.bool)
    front = augment._image(cloud[None, :2], valid[0, :, :2])[0, grid.columns // 2]
    assert float(front) == pytest.approx(10.0)
    empty = torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.bool)
    for behind, seen in ((front + TOLERANCE, True), ((front + TOLERANCE).nextafter(torch.tensor(math.inf)), False)):
        cloud[2, 0] = behind
        chosen = {"points": cloud[None, None], "valid": valid, "boxes": torch.zeros(1, 1, 7)}
        assert bool(augment._occlude(*empty, chosen)[1][0, 0, 2]) is seen


def test_share_and_types():
    batch = batch_of(0)
    nothing = AUGMENT(batch, share=0.0)
    assert torch.equal(nothing["points"], batch["points"])
    assert (nothing["source"] == -1).all()
    half = AUGMENT(batch, share=0.5)
    assert half["boxes"].shape[1] - batch["boxes"].shape[1] == round(4.5) + round(2.5)
    double = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    assert AUGMENT(double)["points"].dtype == torch.float64


def test_random_numbers_are_uniform_and_apart():
    draw = uniform(torch.arange(400), 3, 50)
    assert float(draw.min()) >= 0
    assert float(draw.max()) < 1
    assert float(draw.double().mean()) == pytest.approx(0.5, abs=0.01)
    assert float(draw.double().var()) == pytest.approx(1 / 12, abs=0.003)
    assert abs(float(torch.corrcoef(torch.stack([draw[:, 0], draw[:, 1]]))[0, 1])) < 0.15
    assert draw.unique().numel() > 0.99 * draw.numel()
