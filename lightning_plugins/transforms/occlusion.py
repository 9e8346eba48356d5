"""Occlusion by and of inserted objects, with range images or convex hulls."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_plugins.functional.hidden_points import hidden_points
from lightning_plugins.functional.range_image import RangeGrid, nearest_ranges

TOLERANCE = 0.3  # metres behind a return within which another point is still visible
_FAR = 1e3  # inversion radius relative to the range, for points at different distances


def hidden_in_range_image(
    scene: Tensor, objects: Sequence[Tensor], shadows: Sequence[Tensor], grid: RangeGrid
) -> tuple[Tensor, list[Tensor]]:
    """Find the points hidden behind objects, and the objects' points hidden behind others or the scene.

    Args:
        scene: The frame's own points, shape ``(n, C)``.
        objects: Points of each object.
        shadows: The occluding points of each object: its returns, one per beam.
        grid: The sensor's cells.

    Returns:
        Boolean tensors for the scene and for each object. Scene points outside the objects' cells are never hidden.
    """
    image = nearest_ranges(*grid.cells(torch.cat(list(shadows))), grid)
    cells, ranges = grid.cells(scene)
    behind = torch.where(cells >= 0, image[cells.clamp_min(0)], math.inf)
    shared = behind < math.inf
    front = torch.minimum(image, nearest_ranges(cells[shared], ranges[shared], grid))
    own, distance = grid.cells(torch.cat(list(objects)))
    hidden = (own >= 0) & (distance > front[own.clamp_min(0)] + TOLERANCE)
    return ranges > behind + TOLERANCE, list(hidden.split([len(points) for points in objects]))


def hidden_by_hull(scene: Tensor, objects: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Like `hidden_in_range_image`, with a convex hull of the points in each object's azimuth and elevation window.

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
    """Find the points of an object not occluded by itself, with the paper's radius, 200 times its horizontal extent.

    Args:
        points: Placed points, shape ``(n, C)``.

    Returns:
        Boolean tensor of shape ``(n,)``; farther objects are thinned.
    """
    extent = points[:, :2].amax(dim=0) - points[:, :2].amin(dim=0)
    farthest = float(points[:, :3].norm(dim=1).max())
    factor = 200 * float(extent.norm()) / farthest if farthest > 0 else 1.0
    return ~hidden_points(points, (0.0, 0.0, 0.0), max(1.0, min(factor, 1e4)))
