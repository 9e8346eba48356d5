"""Boxes, hidden points, range images and the ground, against geometry and slow loops."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import ConvexHull

from lightning_plugins.functional import (
    RangeGrid,
    bev_overlap,
    close_gaps,
    ground_height,
    hidden_points,
    nearest_ranges,
    part_occupancy,
    points_in_boxes,
    rotate_z,
    visible_in_range_image,
)

ORIGIN = (0.0, 0.0, 0.0)
GRID = RangeGrid(rows=16, columns=90, lowest=-0.5, highest=0.3)


def sphere(count=4000, seed=0):
    points = torch.from_numpy(np.random.default_rng(seed).normal(size=(count, 3)))
    return points / points.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("distance", [2.0, 5.0, 20.0])
def test_sphere_shows_its_facing_cap(distance):
    points = sphere(20_000)
    visible, truth = ~hidden_points(points, (distance, 0.0, 0.0), 100.0), points[:, 0] > 1 / distance
    assert (visible & truth).sum() >= 0.999 * truth.sum()
    assert (visible & truth).sum() >= 0.97 * visible.sum()


def test_convex_mesh_shows_its_facing_side():
    """Samples of a polytope's faces: visible are those of faces that look at the viewpoint."""
    rng = np.random.default_rng(1)
    hull = ConvexHull(rng.normal(size=(12, 3)))
    view = np.array([6.0, 3.0, 2.0])
    points, facing = [], []
    for simplex, equation in zip(hull.simplices, hull.equations, strict=True):
        weights = rng.dirichlet(np.ones(3) * 1.5, 300)
        points.append(weights @ hull.points[simplex])
        facing.append(np.full(300, equation[:3] @ view + equation[3] > 0))
    visible = ~hidden_points(torch.from_numpy(np.concatenate(points)), view.tolist(), 300.0).numpy()
    truth = np.concatenate(facing)
    assert (visible & truth).sum() >= 0.995 * truth.sum()
    assert (visible & truth).sum() >= 0.95 * visible.sum()


def test_visible_points_grow_with_the_radius():
    points = sphere(1000) * torch.rand(1000, 1, generator=torch.Generator().manual_seed(0)).double()
    counts = [int((~hidden_points(points, (5.0, 0.0, 0.0), factor)).sum()) for factor in (1.0, 10.0, 100.0, 1000.0)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_matches_the_definition_through_scipy():
    points = sphere(300, seed=3) + torch.tensor([4.0, 1.0, 0.0])
    q = points.numpy()
    r = np.linalg.norm(q, axis=1, keepdims=True)
    flipped = q + 2 * (50 * r.max() - r) * q / r
    vertices = ConvexHull(np.vstack([flipped, np.zeros(3)])).vertices
    expected = np.ones(300, dtype=bool)
    expected[vertices[vertices < 300]] = False
    assert hidden_points(points, ORIGIN, 50.0).tolist() == expected.tolist()


DEGENERATE = {
    "none": (torch.zeros(0, 3), []),
    "one": (torch.tensor([[1.0, 2.0, 3.0]]), [False]),
    "at the viewpoint": (torch.zeros(1, 3), [False]),
    "two on a ray": (torch.tensor([[1.0, 0, 0], [2.0, 0, 0]]), [False, True]),
    "on both sides": (torch.tensor([[1.0, 0, 0], [-2.0, 0, 0], [-3.0, 0, 0]]), [False, False, True]),
    "coincident": (torch.tensor([[1.0, 0, 0]] * 3), [False] * 3),
    "three": (torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]), [False] * 3),
    "four, one at the viewpoint": (
        torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0.0, 0, 0], [2.0, 0, 0]]),
        [False] * 3 + [True],
    ),
    "in a plane with the viewpoint": (
        torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [1.0, 1.0, 0], [2.0, 0.0, 0], [0.4, 0.4, 0]]),
        [False, False, True, True, False],
    ),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_clouds(name):
    points, hidden = DEGENERATE[name]
    assert hidden_points(points, ORIGIN).tolist() == hidden


def test_a_wall_is_seen_whole_and_fast():
    y, z = torch.meshgrid(torch.linspace(-3, 3, 60), torch.linspace(-1, 1, 40), indexing="ij")
    wall = torch.stack([torch.full_like(y, 5.0), y, z], dim=-1).reshape(-1, 3)
    hidden = hidden_points(torch.cat([wall, wall + torch.tensor([3.0, 0, 0]) * 1.0, wall]), ORIGIN, 1e3)
    assert not hidden[: len(wall)].any()
    assert not hidden[2 * len(wall) :].any()
    assert hidden_points(torch.cat([wall, wall * 1.5]), ORIGIN, 100.0)[len(wall) :].all()


def test_warns_of_a_ratio_that_hides_nothing():
    with pytest.warns(UserWarning, match="above 1e4"):
        hidden_points(torch.eye(3), ORIGIN, 1e5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hidden_points(torch.eye(3), ORIGIN, 1e4)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_overlap_agrees_with_sampled_rectangles(seed):
    rng = np.random.default_rng(seed)
    a, b = torch.from_numpy(
        np.column_stack([rng.uniform(-2, 2, (2, 3)), rng.uniform(0.5, 4, (2, 3)), rng.uniform(-4, 4, 2)])
    )
    grid = torch.cartesian_prod(*[torch.linspace(-0.499, 0.499, 60).double()] * 2) * a[3:5]
    inside = torch.cat([rotate_z(grid, a[6]) + a[:2], torch.full((len(grid), 1), float(b[2]))], dim=1)
    touches = bool(points_in_boxes(inside, b[None]).any())
    smaller = torch.cat([b[:3], b[3:6] - 0.2, b[6:]])
    if bool(bev_overlap(a[None], smaller[None])):  # by more than the samples are apart
        assert touches
    if touches:
        assert bool(bev_overlap(a[None], b[None]))
    assert bool(bev_overlap(a[None], b[None])) == bool(bev_overlap(b[None], a[None]))


def test_overlap_of_batches_equals_pairs():
    boxes = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0)) * 3
    whole = bev_overlap(boxes, boxes.flip(1))
    for batch in range(3):
        for i in range(5):
            for j in range(5):
                pair = bev_overlap(boxes[batch, i : i + 1], boxes.flip(1)[batch, j : j + 1])
                assert whole[batch, i, j] == pair[0, 0]


def test_points_in_boxes_by_a_loop():
    points, boxes = torch.randn(200, 4).double(), torch.rand(6, 7).double() * 2
    found = points_in_boxes(points, boxes)
    for number, (x, y, z, dx, dy, dz, yaw) in enumerate(boxes.tolist()):
        for place, point in enumerate(points.tolist()):
            c, s = math.cos(yaw), math.sin(yaw)
            along, across = (point[0] - x) * c + (point[1] - y) * s, (point[1] - y) * c - (point[0] - x) * s
            inside = abs(along) <= dx / 2 and abs(across) <= dy / 2 and abs(point[2] - z) <= dz / 2
            assert bool(found[place, number]) == inside
    assert found.shape == (200, 6)


def test_a_point_on_a_face_is_inside():
    box = torch.tensor([[1.0, 2.0, 3.0, 4.0, 2.0, 1.0, 0.0]])
    away = torch.cat([torch.diag(torch.tensor(sides)) for sides in ([2.0, 1.0, 0.5], [-2.0, -1.0, -0.5])])
    assert points_in_boxes(box[:, :3] + away, box).all()
    assert not points_in_boxes(box[:, :3] + 1.001 * away, box).any()


def test_part_occupancy_counts():
    points = torch.tensor([[1.9, 0.9, 0.7], [-1.9, 0.9, -0.7], [9.0, 9.0, 9.0]])
    counts = part_occupancy(points, torch.tensor([4.0, 2.0, 1.5]), (4, 2, 3), mirror=False)
    assert counts[3, 1, 2] == 2  # one outside counts in the nearest part
    assert counts[0, 1, 0] == 1
    assert counts.sum() == 3
    both = part_occupancy(points, torch.tensor([4.0, 2.0, 1.5]), (4, 2, 3))
    torch.testing.assert_close(both, counts + counts.flip(1))


def test_range_image_by_a_loop():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(2, 300, 4, generator=generator, dtype=torch.float64) * torch.tensor([9.0, 9.0, 2.0, 1.0])
    valid = torch.rand(2, 300, generator=generator) < 0.8
    found = visible_in_range_image(points, GRID, valid)
    for batch in range(2):
        nearest = {}
        cells = []
        for point in points[batch].tolist():
            level, azimuth = math.hypot(*point[:2]), math.atan2(point[1], point[0])
            row = math.floor((math.atan2(point[2], level) + 0.5) / 0.8 * 16)
            column = math.floor((azimuth / (2 * math.pi) + 0.5) * 90) % 90
            cells.append(((row, column) if 0 <= row < 16 else None, math.hypot(level, point[2])))
        for (cell, distance), counts in zip(cells, valid[batch].tolist(), strict=True):
            if cell and counts:
                nearest[cell] = min(distance, nearest.get(cell, math.inf))
        expected = [
            counts and (cell is None or distance <= nearest[cell] + 0.3)
            for (cell, distance), counts in zip(cells, valid[batch].tolist(), strict=True)
        ]
        assert found[batch].tolist() == expected


def test_point_at_the_sensor_and_outside_the_rows():
    points = torch.tensor([[0.0, 0, 0], [0.0, 0, 5.0], [5.0, 0, 0], [9.0, 0, 0]])
    assert visible_in_range_image(points, GRID).tolist() == [True, True, True, False]
    assert GRID.cells(points)[0].tolist()[:2] == [-1, -1]


def test_closing_fills_gaps_and_not_the_outside():
    image = torch.full((16, 90), math.inf)
    image[4:12, 88:] = 5.0
    image[4:12, :6] = 5.0  # across the seam of the azimuth
    outline = image.isfinite()
    image[6, 2], image[8, 89], image[9, 3] = math.inf, 30.0, math.inf
    closed = close_gaps(image.flatten(), GRID, (3, 3)).reshape(16, 90)
    assert closed[outline].tolist() == [5.0] * int(outline.sum())
    assert not closed[~outline].isfinite().any()
    assert nearest_ranges(torch.tensor([5, 5]), torch.tensor([3.0, 2.0]), GRID)[5] == 2.0


def test_ground_under_objects_and_walls():
    rng = np.random.default_rng(0)
    ground = np.column_stack([rng.uniform(-3, 3, (200, 2)), rng.normal(0, 0.02, 200)])
    ground[:, 2] += 0.04 * ground[:, 0] - 1.5
    wall = np.column_stack([np.full(150, 1.5), rng.uniform(-2, 2, 150), rng.uniform(-1.4, 1.5, 150)])
    points = torch.from_numpy(np.concatenate([ground, wall]))
    assert float(ground_height(points, torch.zeros(1, 2).double())[0]) == pytest.approx(-1.5, abs=0.03)
    assert ground_height(points[:4], torch.zeros(1, 2).double()).isnan().all()
    line = torch.stack([torch.linspace(-2, 2, 30), torch.zeros(30), torch.full((30,), -1.0)], dim=1)
    assert float(ground_height(line, torch.tensor([[0.0, 1.0]]))[0]) == pytest.approx(-1.0, abs=1e-3)
