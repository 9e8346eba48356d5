"""What inserted objects hide, and what hides them, by range images or by convex hulls."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_plugins.functional.hidden_points import hidden_points
from lightning_plugins.functional.range_image import RangeGrid, close_gaps, nearest_ranges

TOLERANCE = 0.3  # metres behind a return within which another is still seen
_FAR = 1e3  # radius of inversion, as a ratio to the range, of what stands at different distances


def self_visible(points: Tensor, grid: RangeGrid) -> Tensor:
    """Tell which points of one object a sensor gets back: not hidden by the object, and one in each beam's cell.

    Args:
        points: Shape ``(n, C)``, at their place; the sensor is the origin.
        grid: The sensor's cells.

    Returns:
        Boolean tensor of shape ``(n,)``.
    """
    cells, ranges = grid.cells(points)
    visible = (cells >= 0) & (ranges <= object_image([points], grid)[cells.clamp_min(0)] + TOLERANCE)
    nearest = nearest_ranges(torch.where(visible, cells, -1), ranges, grid)
    visible &= ranges <= nearest[cells.clamp_min(0)]
    first = torch.full((grid.rows * grid.columns,), len(points))  # of coincident points the first
    order = torch.arange(len(points))
    first = first.scatter_reduce(0, cells[visible], order[visible], "amin")
    return visible & (first[cells.clamp_min(0)] == order)


def object_image(objects: Sequence[Tensor], grid: RangeGrid) -> Tensor:
    """Nearest range of any of the objects in each cell of a grid, infinity where none is; gaps in each are closed.

    Args:
        objects: Point clouds of shape ``(n, C)``.
        grid: The sensor's cells.

    Returns:
        Shape ``(rows * columns,)``.
    """
    image = torch.full((grid.rows * grid.columns,), math.inf)
    for points in objects:
        cells, ranges = grid.cells(points)
        inside = cells >= 0
        if inside.any():
            places, closed = _closed(cells[inside], ranges[inside].float(), grid)
            image[places] = torch.minimum(image[places], closed)
    return image


def _closed(cells: Tensor, ranges: Tensor, grid: RangeGrid) -> tuple[Tensor, Tensor]:
    """The cells around one object and its closed range image there; only that part of the grid is looked at."""
    rows, columns = cells // grid.columns, cells % grid.columns
    middle, half = columns[0], grid.columns // 2  # columns are counted from one of the object, so that none is torn
    across = (columns - middle + half) % grid.columns
    top, left = rows.min(), across.min()
    height, width = int(rows.max() - top) + 1, int(across.max() - left) + 1
    window = _window(len(cells), height, width, grid)
    small = RangeGrid(height, width + window[1], -0.1, 0.1)  # a margin, since its columns go round
    image = nearest_ranges((rows - top) * small.columns + across - left, ranges, small)
    closed = close_gaps(image, small, window).reshape(height, -1)[:, :width]
    column = (torch.arange(width) + left - half + middle) % grid.columns
    places = (torch.arange(height) + top)[:, None] * grid.columns + column
    return places.flatten(), closed.flatten()


def _window(count: int, height: int, width: int, grid: RangeGrid) -> tuple[int, int]:
    """How wide a gap between points may be: twice their mean distance, were half of them in front."""
    tall, wide = (grid.highest - grid.lowest) / grid.rows, 2 * math.pi / grid.columns
    spacing = math.sqrt(height * tall * width * wide / max(count / 2, 1))
    rows, columns = (2 * math.ceil(min(spacing / size, limit)) + 1 for size, limit in ((tall, 4), (wide, 12)))
    return rows, columns


def hidden_in_range_image(scene: Tensor, objects: Sequence[Tensor], grid: RangeGrid) -> tuple[Tensor, list[Tensor]]:
    """Tell which points are hidden behind objects, and which of the objects' behind others or the scene.

    Args:
        scene: The frame's own points, shape ``(n, C)``.
        objects: Points of each object, after it has hidden its own.
        grid: The sensor's cells.

    Returns:
        Boolean tensors for the scene and for each object. Scene points outside of the objects' cells are never hidden.
    """
    image = object_image(objects, grid)
    cells, ranges = grid.cells(scene)
    behind = torch.where(cells >= 0, image[cells.clamp_min(0)], math.inf)
    shared = behind < math.inf
    seen = nearest_ranges(torch.where(shared, cells, -1)[shared], ranges[shared], grid)
    front = torch.minimum(image.to(seen), seen)
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
