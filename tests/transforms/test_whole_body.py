"""Whole-body augmentation: what it inserts, what it hides, and that it is the same in any worker."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_plugins.data import ObjectBank, RaycastScenes, Shape, SpinningSensor, frame_of, scan
from lightning_plugins.functional import bev_overlap, points_in_boxes
from lightning_plugins.transforms import FlipRotateScale, GroundTruthSampling, PolarMix, WholeBodyAugmentation
from lightning_plugins.transforms.frame import Frame

SENSOR = SpinningSensor(beams=32, columns=1024, lowest=-24.0, highest=2.0, noise=0.0)
SMALL = SpinningSensor(beams=16, columns=256)
SCENES = RaycastScenes(4, SMALL, seed=0)
FRAMES = [SCENES[number] for number in range(4)]
BANK = ObjectBank.from_frames(FRAMES)


def cuboid(x, y, yaw=0.0):
    return Shape((x, y, 0.8 - SENSOR.height, 4.2, 1.8, 1.6, yaw), label="Car")


def whole(**arguments):
    return WholeBodyAugmentation(BANK, {"Car": 9, "Pedestrian": 6}, grid=SMALL.grid, **arguments)


def assert_equal(one, other):
    for key in ("points", "boxes", "source"):
        np.testing.assert_array_equal(one[key], other[key])
    assert one["labels"] == other["labels"]


@pytest.fixture(scope="module")
def cuboids():
    rng = np.random.default_rng(0)
    views = [cuboid(x, y, yaw) for x, y, yaw in rng.uniform((5, -8, -3), (14, 8, 3), (40, 3))]
    return ObjectBank.from_frames(frame_of([view], scan([view], SENSOR)) for view in views)


@pytest.mark.parametrize("distance", [6.0, 15.0, 30.0])
def test_an_inserted_object_is_that_of_a_new_scan(cuboids, distance):
    wall = Shape((distance + 6, 2.0, 0.0, 0.3, 30.0, 4.0, 0.0))
    car = cuboid(distance, 1.0, 0.7)
    empty, truth = scan([wall], SENSOR), scan([wall, car], SENSOR)
    augment = WholeBodyAugmentation(cuboids, {}, grid=SENSOR.grid, fill=1.0)
    body = augment.construct(3, np.random.default_rng(0))
    body.box[[0, 1, 2, 6]] = torch.tensor([car.box[0], car.box[1], car.box[2], car.box[6]])
    frame = Frame.read({"points": empty.points, "boxes": np.zeros((0, 7)), "labels": []})
    found = augment.insert(frame, [body])
    cells, mine = SENSOR.grid.cells(found.points)[0], found.source >= 0
    wanted, got = set(truth.cells[truth.hit == 1].tolist()), set(cells[mine].tolist())
    assert len(wanted & got) / len(wanted | got) > 0.9
    assert len(got) == int(mine.sum())  # one return on a beam
    left = set(cells[~mine].tolist())
    assert len(left & wanted) < 0.05 * len(wanted)  # what it hides is gone
    assert len(set(truth.cells[truth.hit < 1].tolist()) - left) <= len(got - wanted) + 0.01 * len(left)  # nothing else


@pytest.mark.parametrize("occluder", ["range_image", "hull"])
def test_what_stands_in_front_hides_an_object(cuboids, occluder):
    wall = Shape((8.0, 0.0, 0.0, 0.3, 20.0, 5.0, 0.0))
    frame = {"points": scan([wall], SENSOR).points, "boxes": np.zeros((0, 7), np.float32), "labels": []}
    behind = WholeBodyAugmentation(
        cuboids, {"Car": 1}, occluder=occluder, grid=SENSOR.grid, area=((14.0, 15.0), (-1.0, 1.0))
    )
    hidden = behind(frame)
    if occluder == "hull":  # lets points shine through a wall of sparse returns
        alone = behind({**frame, "points": scan([], SENSOR).points})
        assert (hidden["source"] >= 0).sum() < 0.5 * (alone["source"] >= 0).sum()
    else:
        assert len(hidden["boxes"]) == 0
    before = WholeBodyAugmentation(
        cuboids, {"Car": 1}, occluder=occluder, grid=SENSOR.grid, area=((4.9, 5.0), (-1.0, 1.0)), stages=["placement"]
    )
    assert len(before(frame)["boxes"]) == 1


def test_only_points_in_the_windows_of_objects_go():
    frame = FRAMES[1]
    result = whole(seed=3)(frame)
    kept = {point.tobytes() for point in result["points"][result["source"] < 0]}
    lost = np.array([point for point in frame["points"] if point.tobytes() not in kept])
    assert 0 < len(lost) < 0.5 * len(frame["points"])
    cells = set(SMALL.grid.cells(torch.from_numpy(result["points"][result["source"] >= 0]))[0].tolist())
    new = torch.from_numpy(result["boxes"][-20:])
    inside = points_in_boxes(torch.from_numpy(lost), new).any(1)
    behind = torch.tensor([cell in cells for cell in SMALL.grid.cells(torch.from_numpy(lost))[0].tolist()])
    assert (inside | behind).float().mean() > 0.9  # the rest stood behind an object that was hidden in its turn


def test_objects_stand_free_and_on_the_ground():
    result = whole(seed=1)(FRAMES[0])
    boxes = torch.from_numpy(result["boxes"])
    new = len(boxes) - sum(label in result["labels"] for label in FRAMES[0]["labels"])
    overlaps = bev_overlap(boxes, boxes).fill_diagonal_(False)
    assert new > 0
    assert not overlaps.any()
    added = boxes[len(FRAMES[0]["boxes"]) :]
    torch.testing.assert_close(added[:, 2] - added[:, 5] / 2, torch.full((len(added),), -1.73), atol=0.1, rtol=0)


def test_placement_on_a_slope():
    x, y = np.meshgrid(np.linspace(4, 40, 120), np.linspace(-20, 20, 120))
    points = np.column_stack([x.ravel(), y.ravel(), 0.05 * x.ravel() - 2, np.zeros(x.size)]).astype(np.float32)
    frame = Frame.read({"points": points, "boxes": [], "labels": []})
    augment = whole(area=((10.0, 30.0), (-10.0, 10.0)))
    body = augment.place(augment.construct(0, np.random.default_rng(0)), frame, [], np.random.default_rng(0))
    assert float(body.box[2] - body.box[5] / 2) == pytest.approx(0.05 * float(body.box[0]) - 2, abs=0.01)


def test_an_object_needs_five_points():
    augment = WholeBodyAugmentation(BANK, {}, stages=["placement"], grid=SMALL.grid)
    body = augment.construct(int(np.argmax([len(one.points) for one in BANK])), np.random.default_rng(0))
    frame = Frame.read(FRAMES[0])
    for count in (4, 5):
        few = replace(body, points=body.points[:count], source=body.source[:count])
        assert len(augment.insert(frame, [few]).boxes) == len(frame.boxes) + (count == 5)


def test_construction_completes_an_object(cuboids):
    rng = np.random.default_rng(0)
    alone = WholeBodyAugmentation(cuboids, {}, stages=["placement"]).construct(0, rng)
    body = WholeBodyAugmentation(cuboids, {}).construct(0, rng)
    assert len(alone.points) == len(cuboids[0].points)
    assert len(body.points) >= 2 * len(alone.points)
    assert set(body.source.tolist()) <= {0, *cuboids.candidates(0).tolist()}
    assert (2 * body.points[:, :3].abs() <= body.box[3:6]).all()
    mirrored = body.points * torch.tensor([1.0, -1.0, 1.0, 1.0])
    assert {tuple(row) for row in mirrored.tolist()} == {tuple(row) for row in body.points.tolist()}
    assert len(WholeBodyAugmentation(cuboids, {}, fill=1.0).construct(0, rng).points) > len(body.points)


def test_pedestrians_are_not_mirrored():
    number = int(BANK.members("Pedestrian")[0])
    body = whole(fill=0.0).construct(number, np.random.default_rng(0))
    assert len(body.points) == len(BANK[number].points)


def test_every_stage_alone():
    plain = WholeBodyAugmentation(BANK, {"Car": 9}, stages=[], seed=5)(FRAMES[0])
    pasted = GroundTruthSampling(BANK, {"Car": 9}, seed=5)(FRAMES[0])
    assert_equal(plain, pasted)
    seen = {tuple(box) for box in BANK.arrays["boxes"].tolist()}
    assert all(tuple(box) in seen for box in plain["boxes"].tolist())  # where they were seen
    for stage in ("construction", "placement", "self_occlusion", "external_occlusion"):
        found = WholeBodyAugmentation(BANK, {"Car": 9}, stages=[stage], grid=SMALL.grid, seed=5)(FRAMES[0])
        assert len(found["boxes"]) > len(FRAMES[0]["boxes"])
        assert not np.array_equal(found["points"], plain["points"])


@pytest.mark.parametrize("kind", ["numpy", "torch", "float64"])
def test_keeps_kinds_features_and_other_keys(kind):
    frame = {**FRAMES[2], "name": "x"}
    if kind == "torch":
        frame.update(points=torch.from_numpy(frame["points"]), boxes=torch.from_numpy(frame["boxes"]))
    if kind == "float64":
        frame["points"] = frame["points"].astype(np.float64)
    result = whole()(frame)
    assert type(result["points"]) is type(frame["points"])
    assert result["points"].dtype == frame["points"].dtype
    assert result["name"] == "x"
    mine = np.asarray(result["source"]) >= 0
    known = {float(value) for value in np.unique(BANK.arrays["points"][:, 3])}
    assert set(np.asarray(result["points"])[mine, 3].tolist()) <= known
    assert len(result["points"]) == len(result["source"])


def test_read_only_frames_are_left_alone_without_a_warning(tmp_path):
    """As they come from files that are mapped into memory."""
    np.save(tmp_path / "points.npy", FRAMES[0]["points"])
    mapped = np.load(tmp_path / "points.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = whole()({**FRAMES[0], "points": mapped})
    assert_equal(result, whole()(FRAMES[0]))


class Augmented(Dataset):
    def __init__(self, transform, indexed):
        self.transform, self.indexed = transform, indexed

    def __len__(self):
        return len(FRAMES)

    def __getitem__(self, number):
        return self.transform({k: v for k, v in FRAMES[number].items() if self.indexed or k != "index"})


@pytest.mark.parametrize("indexed", [True, False])
def test_the_same_whatever_the_number_of_workers(indexed):
    transform = whole(seed=2)
    data = Augmented(transform, indexed)
    loaders = [DataLoader(data, None, num_workers=n, persistent_workers=n > 0) for n in (0, 2)]
    epochs = []
    for epoch in range(2):
        transform.set_epoch(epoch)  # reaches workers that go on from the epoch before
        alone, shared = (list(loader) for loader in loaders)
        for one, other in zip(alone, shared, strict=True):
            assert_equal(one, other)
        epochs.append(alone)
    assert not np.array_equal(epochs[0][0]["points"], epochs[1][0]["points"])


@pytest.mark.parametrize(
    "kind",
    [whole, lambda **a: GroundTruthSampling(BANK, {"Car": 9}, **a), None],
    ids=lambda made: getattr(made, "__name__", str(made)),
)
def test_seeds_and_repeats(kind):
    make = kind or (lambda **arguments: PolarMix(FRAMES, **arguments))
    first, again, other = make(seed=1)(FRAMES[0]), make(seed=1)(FRAMES[0]), make(seed=2)(FRAMES[0])
    assert_equal(first, again)
    assert first["points"].shape != other["points"].shape or (first["points"] != other["points"]).any()


def test_empty_frames_and_targets():
    empty = {"points": np.zeros((0, 4), np.float32), "boxes": np.zeros((0, 7), np.float32), "labels": []}
    assert len(whole()(empty)["boxes"]) > 0  # at their old height
    unchanged = WholeBodyAugmentation(BANK, {})(FRAMES[0])
    np.testing.assert_array_equal(unchanged["points"], FRAMES[0]["points"])
    full = WholeBodyAugmentation(BANK, {"Car": 1})(FRAMES[0])
    assert full["labels"] == FRAMES[0]["labels"]


@pytest.mark.parametrize("wanted", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_overlap_in_many_placements(wanted):
    augment, placed, number = whole(seed=1), 0, 0
    while placed < wanted:
        number += 1
        frame, rng = Frame.read(FRAMES[number % 4]), np.random.default_rng(number)
        bodies = []
        for member in rng.integers(len(BANK), size=30):
            body = augment.place(augment.construct(int(member), rng), frame, bodies, rng)
            bodies += [] if body is None else [body]
        boxes = torch.cat([frame.boxes, torch.stack([body.box for body in bodies])])
        assert int(bev_overlap(boxes, boxes).sum()) == len(boxes)
        placed += len(bodies)
        assert number < wanted / 10  # more than ten in a frame


def test_polar_mix_takes_half_a_turn():
    mixed = PolarMix(FRAMES[3:], swap=1.0, paste=0.0)(FRAMES[0])
    own = mixed["points"][mixed["source"] < 0]
    taken = mixed["points"][mixed["source"] == 0]
    for points, among in ((own, FRAMES[0]), (taken, FRAMES[3])):
        assert {p.tobytes() for p in points} < {p.tobytes() for p in among["points"]}
    turns = np.sort(np.arctan2(own[:, 1], own[:, 0]))
    assert np.diff(turns, append=turns[0] + 2 * np.pi).max() > 3.0
    pasted = PolarMix(FRAMES[3:], swap=0.0)(FRAMES[0])
    assert len(pasted["boxes"]) == len(FRAMES[0]["boxes"]) + 3 * len(FRAMES[3]["boxes"])
    points, boxes = torch.from_numpy(pasted["points"]), torch.from_numpy(pasted["boxes"])
    last = points_in_boxes(points[pasted["source"] >= 0], boxes[-len(FRAMES[3]["boxes"]) :])
    assert (last.sum(0) > 0).all()


def test_flip_rotate_scale_moves_points_with_their_boxes():
    frame = FRAMES[1]
    for seed in range(4):
        moved = FlipRotateScale(seed=seed)(frame)
        before, after = (
            points_in_boxes(torch.from_numpy(f["points"]).double(), torch.from_numpy(f["boxes"]).double()).sum(0)
            for f in (frame, moved)
        )
        torch.testing.assert_close(after.double(), before.double(), atol=3.0, rtol=0.02)
        assert not np.array_equal(moved["points"], frame["points"])
