"""Object bank, ray-cast scenes and KITTI's files."""

import math
import pickle
from collections import Counter

import numpy as np
import pytest
import torch

from lightning_plugins.data import (
    KITTIFrames,
    ObjectBank,
    RaycastScenes,
    Shape,
    SpinningSensor,
    prism,
    read_kitti_points,
    scan,
)
from lightning_plugins.functional import bev_overlap, points_in_boxes

SMALL = SpinningSensor(beams=16, columns=256)
FRAMES = [RaycastScenes(3, SMALL)[number] for number in range(3)]
BANK = ObjectBank.from_frames(FRAMES)
CUBE = prism([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)])


def test_bank_holds_the_objects_in_their_frames():
    names = [label for frame in FRAMES for label in frame["labels"]]
    assert len(BANK) <= len(names)
    for number in range(len(BANK)):
        one = BANK[number]
        assert len(one.points) >= 5
        assert (np.abs(one.points[:, :3]) <= one.box[3:6] / 2 + 0.06).all()
    assert {one.label for one in map(BANK.__getitem__, range(len(BANK)))} == set(BANK.classes)
    assert BANK.arrays["occupancy"].max() <= 1
    assert BANK.arrays["occupancy"].min() >= 0


def test_candidates_by_the_definition():
    """Written out for one class, with loops."""
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(9):
        size = rng.uniform(1, 3, 3)
        points = rng.uniform(-0.5, 0.5, (int(rng.integers(5, 40)), 3)) * size
        frames.append({"points": points, "boxes": [[0, 0, 0, *size, 0]], "labels": ["Cyclist"]})
    bank = ObjectBank.from_frames(frames, margin=0.0)
    occupancy, sizes = bank.arrays["occupancy"], bank.arrays["boxes"][:, 3:6]
    for one in range(9):
        iou = {}
        for other in set(range(9)) - {one}:
            common = np.minimum(sizes[one], sizes[other]).prod()
            iou[other] = common / (sizes[one].prod() + sizes[other].prod() - common)
        similar = sorted(iou, key=iou.get, reverse=True)[:800]
        weak = occupancy[one] < 0.8 * occupancy[one].mean()
        best = sorted(similar, key=lambda other: -occupancy[other][weak].sum())[:4]
        assert set(bank.candidates(one).tolist()) == set(best)
        assert len(bank.candidates(one, top_k=2)) == 2


def test_saved_and_mapped(tmp_path):
    BANK.save(tmp_path / "bank")
    assert sorted(path.suffix for path in (tmp_path / "bank").iterdir()) == [".json"] + [".npy"] * 6
    loaded = ObjectBank.load(tmp_path / "bank")
    assert isinstance(loaded.arrays["points"], np.memmap)
    assert not loaded.arrays["points"].flags.writeable
    assert (loaded.classes, loaded.parts) == (BANK.classes, BANK.parts)
    for name, array in BANK.arrays.items():
        np.testing.assert_array_equal(loaded.arrays[name], array)
    sent = pickle.dumps(loaded)  # to a worker that is not forked: by its folder
    assert len(sent) < 1000
    np.testing.assert_array_equal(pickle.loads(sent)[2].points, BANK[2].points)
    with pytest.raises(FileNotFoundError, match=r"`folder` must hold what `ObjectBank.save` wrote"):
        ObjectBank.load(tmp_path)


def test_rays_hit_where_geometry_says():
    sensor = SpinningSensor(beams=64, columns=720, noise=0.0)
    yaw = 0.4
    shapes = [
        Shape((12.0, 1.0, 0.0, 4.0, 2.0, 3.0, yaw)),
        Shape((-9.0, 0.0, 0.0, 1.5, 0.4, 3.0, 0.0), "cylinder"),  # its diameter is `dx` alone
    ]
    found = scan(shapes, sensor)
    on_box = torch.from_numpy(found.points[found.hit == 0]).double()
    box = torch.tensor([shapes[0].box]).double()
    wide, narrow = box.clone(), box.clone()
    wide[:, 3:6] += 1e-4
    narrow[:, 3:6] -= 1e-4
    assert points_in_boxes(on_box, wide).all()
    assert not points_in_boxes(on_box, narrow).any()
    round_ = found.points[found.hit == 1]
    radius = np.hypot(round_[:, 0] + 9, round_[:, 1])
    side = np.abs(np.abs(round_[:, 2]) - 1.5) > 1e-3
    np.testing.assert_allclose(radius[side], 0.75, atol=1e-4)
    ground = found.points[found.hit == -1]
    np.testing.assert_allclose(ground[:, 2], -1.73, atol=1e-4)
    assert np.unique(found.cells).size == len(found.cells)
    cells = sensor.grid.cells(torch.from_numpy(found.points))[0]
    assert cells.tolist() == found.cells.tolist()


def test_a_mesh_of_a_cuboid_is_the_cuboid():
    box = (10.0, -2.0, 0.3, 4.0, 2.0, 1.5, 0.8)
    one, other = (scan([Shape(box, kind, triangles=CUBE)], SMALL) for kind in ("box", "mesh"))
    np.testing.assert_allclose(one.points, other.points, atol=1e-4)
    assert one.hit.tolist() == other.hit.tolist()


def test_noise_and_lost_returns():
    rng = np.random.default_rng
    clean = scan([], SpinningSensor(noise=0.0))
    noisy = scan([], SpinningSensor(noise=0.05), rng(0))
    difference = np.linalg.norm(noisy.points[:, :3], axis=1) - np.linalg.norm(clean.points[:, :3], axis=1)
    assert difference.std() == pytest.approx(0.05, rel=0.05)
    assert len(scan([], SpinningSensor(dropout=0.25), rng(0)).points) == pytest.approx(
        0.75 * len(clean.points), rel=0.02
    )


def test_scenes_depend_on_seed_and_number_only():
    again = RaycastScenes(3, SMALL)[1]
    np.testing.assert_array_equal(again["points"], FRAMES[1]["points"])
    assert len(RaycastScenes(3, SMALL, seed=1)[1]["points"]) != len(again["points"])
    boxes = torch.tensor([shape.box for shape in RaycastScenes(3, SMALL).shapes(0)])
    assert int(bev_overlap(boxes, boxes).sum()) == len(boxes)
    with pytest.raises(IndexError):
        RaycastScenes(3, SMALL)[3]


def test_a_scene_has_the_objects_that_are_asked_for():
    def count(**settings):
        return Counter(shape.label for shape in RaycastScenes(1, SMALL, **settings).shapes(0))

    assert count() == {"Car": 6, "Cyclist": 2, "Pedestrian": 3, None: 12}  # walls and poles have no class
    assert count(objects={"Pedestrian": 1}, scenery=2) == {"Pedestrian": 1, None: 2}


CALIBRATION = """P2: 7.0e+02 0 6.0e+02 4.5e+01 0 7.0e+02 1.7e+02 2.1e-01 0 0 1 2.7e-03
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_velo_to_cam: 0 -1 0 0.1 0 0 -1 -0.2 1 0 0 -0.3
"""
LABELS = """Car 0.00 0 -1.58 587.0 173.3 614.1 200.1 1.65 1.67 3.64 -0.65 1.71 46.70 -1.57
DontCare -1 -1 -10 503.8 169.7 590.6 190.1 -1 -1 -1 -1000 -1000 -1000 -10
Pedestrian 0.00 0 0.2 1 2 3 4 1.8 0.6 0.9 2.0 1.5 10.0 0.0
"""


@pytest.fixture
def kitti(tmp_path):
    for folder in ("velodyne", "label_2", "calib"):
        (tmp_path / folder).mkdir()
    points = np.arange(12, dtype="<f4").reshape(3, 4)
    points.tofile(tmp_path / "velodyne" / "000008.bin")
    (tmp_path / "label_2" / "000008.txt").write_text(LABELS)
    (tmp_path / "calib" / "000008.txt").write_text(CALIBRATION)
    return tmp_path


def test_kitti_layout(kitti):
    (frame,) = [KITTIFrames(kitti)[number] for number in range(len(KITTIFrames(kitti)))]
    assert frame["points"].tolist() == np.arange(12.0).reshape(3, 4).tolist()
    assert (frame["labels"], frame["index"]) == (["Car", "Pedestrian"], 8)
    x, y, z, dx, dy, dz, yaw = frame["boxes"][0].tolist()
    # camera = (-y + 0.1, -z - 0.2, x - 0.3), and the label is the middle of the bottom
    assert (x, y, z) == pytest.approx((47.0, 0.75, -1.91 + 1.65 / 2), abs=1e-5)
    assert (dx, dy, dz) == pytest.approx((3.64, 1.67, 1.65))
    assert yaw == pytest.approx(1.57 - math.pi / 2, abs=1e-6)
    assert frame["boxes"][1, 6] == pytest.approx(-math.pi / 2)


def test_broken_kitti_files_are_named(kitti):
    (kitti / "velodyne" / "000008.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="`path` must hold points of four float32, got 3 bytes"):
        read_kitti_points(kitti / "velodyne" / "000008.bin")
    np.zeros(4, "<f4").tofile(kitti / "velodyne" / "000008.bin")
    (kitti / "label_2" / "000008.txt").write_text("Car 0 0\n")
    with pytest.raises(ValueError, match="`path` must have 15 fields in a line, got 3 in line 1"):
        KITTIFrames(kitti)[0]
    (kitti / "calib" / "000008.txt").write_text("P2: 1\n")
    with pytest.raises(ValueError, match="`calibration` must have the matrices R0_rect and Tr_velo_to_cam"):
        KITTIFrames(kitti)[0]
    with pytest.raises(FileNotFoundError, match="`root` must have velodyne"):
        KITTIFrames(kitti / "calib")
