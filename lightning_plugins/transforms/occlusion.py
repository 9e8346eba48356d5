"""What inserted objects hide, and what hides them, by range images or by convex hulls."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_plugins.functional.hidden_points import hidden_points
from lightning_plugins.functional.range_image import RangeGrid, close_gaps, nearest_ranges

TOLERANCE = 0.3  # metres behind a return within which another is still seen
# A point fills its cell, so the outline grows by half a cell on every side. With so many fine cells across the object
# that is less than a hundredth of it, however few beams meet it: at 60 m a car is four rows high.
_ACROSS = 128
_FAR = 1e3  # radius of inversion, as a ratio to the range, of what stands at different distances


def object_returns(points: Tensor, grid: RangeGrid) -> tuple[Tensor, Tensor]:
    """Take an object's returns: one on each beam that meets it, at the nearest of its surfaces.

    The points are laid on a finer grid, with at least 128 cells along and across the object, whose gaps are closed as
    far as the points are apart; a beam meets the object if the cell in its middle is covered. So an object keeps its
    outline, one that stands nearer than it was seen gets its points, and no surface shines through another in front.

    Args:
        points: Shape ``(n, C)``, at their place; the sensor is the origin.
        grid: The sensor's cells.

    Returns:
        The returns, shape ``(k, C)``, with the features of the nearest point in the beam's row; and the numbers of
        those points, shape ``(k,)``.
    """
    cells, ranges = grid.cells(points)
    inside = (cells >= 0).nonzero().flatten()
    if len(inside) == 0:
        return points[:0], inside
    rows, columns = cells[inside] // grid.columns, cells[inside] % grid.columns
    half = grid.columns // 2
    finer = _fineness(rows), _fineness((columns - columns[0] + half) % grid.columns)
    fine = RangeGrid(finer[0] * grid.rows, finer[1] * grid.columns, grid.lowest, grid.highest)
    places, image = _closed(fine.cells(points[inside])[0], ranges[inside], fine, finer)
    row, column = places // fine.columns, places % fine.columns
    hit = (row % finer[0] == finer[0] // 2) & (column % finer[1] == finer[1] // 2) & (image < math.inf)
    row, column, image = row[hit] // finer[0], column[hit] // finer[1], image[hit]
    elevation = grid.lowest + (row + 0.5) * (grid.highest - grid.lowest) / grid.rows
    azimuth = ((column + 0.5) / grid.columns - 0.5) * 2 * math.pi
    level = image * elevation.cos()
    xyz = torch.stack([level * azimuth.cos(), level * azimuth.sin(), image * elevation.sin()], dim=1).to(points)
    own = inside[_nearest_number(grid.cells(points[inside])[0], row * grid.columns + column)]
    return torch.cat([xyz, points[own, 3:]], dim=1), own


def _fineness(numbers: Tensor) -> int:
    """Fine cells to a beam's own: an odd number of at least three, so that one is in the middle."""
    count = int(numbers.max() - numbers.min()) + 1
    return max(3, 2 * math.ceil((_ACROSS / count - 1) / 2) + 1)


def _nearest_number(cells: Tensor, wanted: Tensor) -> Tensor:
    """The place among ``cells`` of the one nearest to each wanted number."""
    ordered, order = cells.sort(stable=True)
    after = torch.searchsorted(ordered, wanted).clamp(max=len(cells) - 1)
    before = (after - 1).clamp(min=0)
    nearer = (wanted - ordered[before]).abs() < (ordered[after] - wanted).abs()
    return order[torch.where(nearer, before, after)]


def _closed(cells: Tensor, ranges: Tensor, grid: RangeGrid, finer: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The cells around one object and its closed range image there; only that part of the grid is looked at."""
    rows, columns = cells // grid.columns, cells % grid.columns
    middle, half = columns[0], grid.columns // 2  # columns are counted from one of the object, so that none is torn
    across = (columns - middle + half) % grid.columns
    top, left = rows.min(), across.min()
    height, width = int(rows.max() - top) + 1, int(across.max() - left) + 1
    window = _window(len(cells), height, width, grid, finer)
    small = RangeGrid(height, width + window[1], -0.1, 0.1)  # a margin, since its columns go round
    image = nearest_ranges((rows - top) * small.columns + across - left, ranges, small)
    closed = close_gaps(image, small, window).reshape(height, -1)[:, :width]
    column = (torch.arange(width) + left - half + middle) % grid.columns
    places = (torch.arange(height) + top)[:, None] * grid.columns + column
    return places.flatten(), closed.flatten()


def _window(count: int, height: int, width: int, grid: RangeGrid, finer: tuple[int, int]) -> tuple[int, int]:
    """How wide a gap between points may be: three times their mean distance, were half of them in front."""
    tall, wide = (grid.highest - grid.lowest) / grid.rows, 2 * math.pi / grid.columns
    spacing = math.sqrt(height * tall * width * wide / max(count / 2, 1))
    rows, columns = (
        2 * math.ceil(min(1.5 * spacing / size, limit)) + 1
        for size, limit in ((tall, 4 * finer[0]), (wide, 12 * finer[1]))
    )
    return rows, columns


def hidden_in_range_image(
    scene: Tensor, objects: Sequence[Tensor], shadows: Sequence[Tensor], grid: RangeGrid
) -> tuple[Tensor, list[Tensor]]:
    """Tell which points are hidden behind objects, and which of the objects' behind others or the scene.

    Args:
        scene: The frame's own points, shape ``(n, C)``.
        objects: Points of each object.
        shadows: What hides others of each object: its returns, one on each beam.
        grid: The sensor's cells.

    Returns:
        Boolean tensors for the scene and for each object. Scene points outside of the objects' cells are never hidden.
    """
    cells, ranges = grid.cells(torch.cat(list(shadows)))
    image = nearest_ranges(cells, ranges, grid)
    cells, ranges = grid.cells(scene)
    behind = torch.where(cells >= 0, image[cells.clamp_min(0)], math.inf)
    shared = behind < math.inf
    front = torch.minimum(image, nearest_ranges(cells[shared], ranges[shared], grid))
    hidden = []
    for points in objects:
        own, distance = grid.cells(points)
        hidden.append((own >= 0) & (distance > front[own.clamp_min(0)] + TOLERANCE))
    return ranges > behind + TOLERANCE, hidden


def hidden_by_hull(scene: Tensor, objects: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """As `hidden_in_range_image`, by a convex hull of what lies in the window of azimuth and elevation of each object.

    Args:
        scene: The frame's own points, shape ``(n, C)``.
        objects: Points of each object.

    Returns:
        Boolean tensors for the scene and for each object.
    """
    everything = torch.cat([scene, *objects])
    azimuth = torch.atan2(everything[:, 1], everything[:, 0])
    elevation = torch.atan2(everything[:, 2], everything[:, :2].norm(dim=1))
    hidden = torch.zeros(len(everything), dtype=torch.bool)
    sizes = [len(scene), *map(len, objects)]
    for start, count in zip(torch.tensor(sizes).cumsum(0)[:-1].tolist(), sizes[1:], strict=True):
        if not count:
            continue
        own = slice(start, start + count)
        turned = (azimuth - azimuth[start] + math.pi) % (2 * math.pi) - math.pi
        window = (turned >= turned[own].min()) & (turned <= turned[own].max())
        window &= (elevation >= elevation[own].min()) & (elevation <= elevation[own].max())
        hidden[window.nonzero().flatten()] |= hidden_points(everything[window], (0.0, 0.0, 0.0), _FAR)
    parts = hidden.split(sizes)
    return parts[0], list(parts[1:])


def visible_by_hull(points: Tensor) -> Tensor:
    """Tell which points of one object it does not hide itself, with the paper's radius, 200 times its length in plan.

    Args:
        points: Shape ``(n, C)``, at their place.

    Returns:
        Boolean tensor of shape ``(n,)``; farther objects are thinned.
    """
    extent = points[:, :2].amax(dim=0) - points[:, :2].amin(dim=0)
    farthest = float(points[:, :3].norm(dim=1).max())
    factor = 200 * float(extent.norm()) / farthest if farthest > 0 else 1.0
    return ~hidden_points(points, (0.0, 0.0, 0.0), max(1.0, min(factor, 1e4)))
