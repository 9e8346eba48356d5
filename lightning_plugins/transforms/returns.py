"""Returns of objects to a sensor: one per beam that hits an object."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_plugins.functional.range_image import RangeGrid

# A point fills its cell, so the outline grows by half a cell on every side. With this many cells across the object that
# is less than a hundredth of its size, however few beams hit it: at 60 m a car is four rows high.
_ACROSS = 128


def object_returns(clouds: Sequence[Tensor], grid: RangeGrid) -> list[tuple[Tensor, Tensor]]:
    """Compute the returns of each object on its own: one per beam that hits it, from its nearest surface.

    The points of an object are projected onto a finer grid, with at least 128 cells along and across it, whose gaps are
    closed according to the point spacing; a beam hits the object if its central cell is covered. An object thus keeps
    its outline, gets enough points when moved closer than it was seen, and no surface is visible through another one in
    front.

    Args:
        clouds: The placed points of each object, of shape ``(n, C)``; the sensor is the origin.
        grid: The sensor's cells.

    Returns:
        The returns of each object, shape ``(k, C)``, with the features of a nearby point in the beam's row; and the
        indices of those points, shape ``(k,)``.
    """
    sizes = [len(cloud) for cloud in clouds]
    if not sum(sizes):
        return [(cloud, torch.zeros(0, dtype=torch.int64)) for cloud in clouds]
    ends = np.cumsum(sizes)[:-1]
    points = torch.cat([cloud[:, :3] for cloud in clouds])
    exact = points if points.dtype == torch.float64 else points.float()  # half precision cannot count the fine cells
    shares = [np.split(share.numpy(), ends) for share in grid.shares(exact)]
    met = [_meet(up, around, ranges, grid) for up, around, ranges in zip(*shares, strict=True)]
    rows, columns, ranges, _ = (np.concatenate(parts) for parts in zip(*met, strict=True))
    elevation = grid.lowest + (rows + 0.5) * ((grid.highest - grid.lowest) / grid.rows)
    azimuth = ((columns + 0.5) / grid.columns - 0.5) * (2 * math.pi)
    level = ranges * np.cos(elevation)
    xyz = np.stack([level * np.cos(azimuth), level * np.sin(azimuth), ranges * np.sin(elevation)], axis=1)
    places = torch.from_numpy(xyz).to(clouds[0]).split([len(own[0]) for own in met])
    numbers = [torch.from_numpy(own[3]) for own in met]
    return [
        (torch.cat([place, cloud[number, 3:]], dim=1), number)
        for place, cloud, number in zip(places, clouds, numbers, strict=True)
    ]


def _meet(up: np.ndarray, around: np.ndarray, ranges: np.ndarray, grid: RangeGrid) -> tuple[np.ndarray, ...]:
    """Row, column, range and index of a nearby point, for each beam that hits an object."""
    row = np.floor(up * grid.rows)
    inside = np.flatnonzero((row >= 0) & (row < grid.rows) & (ranges > 0))
    if not len(inside):
        return inside, inside, ranges[:0], inside
    up, around, rows = up[inside], around[inside], row[inside].astype(np.int64)
    columns = (around * grid.columns).astype(np.int64) % grid.columns
    first, half = int(columns[0]), grid.columns // 2  # relative to a column of the object, which never wraps around
    across = (columns - first + half) % grid.columns
    finer = _fineness(rows), _fineness(across)
    fine_rows = np.minimum((up * (grid.rows * finer[0])).astype(np.int64), grid.rows * finer[0] - 1)
    whole = grid.columns * finer[1]
    fine_across = ((around * whole).astype(np.int64) - (first - half) * finer[1]) % whole
    top, left = int(fine_rows.min()), int(fine_across.min())
    nearness = np.zeros((int(fine_rows.max()) - top + 1, int(fine_across.max()) - left + 1), dtype=ranges.dtype)
    np.maximum.at(nearness, (fine_rows - top, fine_across - left), 1 / ranges[inside])
    begin = (finer[0] // 2 - top) % finer[0], (finer[1] // 2 - left) % finer[1]
    closed = _closed(nearness, _window(len(inside), nearness.shape, grid, finer), begin, finer)
    met_row, met_across = closed.nonzero()
    nearest = 1 / closed[met_row, met_across]
    met_row, met_across = met_row + (top + begin[0]) // finer[0], met_across + (left + begin[1]) // finer[1]
    stride = 2 * grid.columns
    own = inside[_nearest_number(rows * stride + across, met_row * stride + met_across)]
    return met_row, (met_across + first - half) % grid.columns, nearest, own


def _fineness(numbers: np.ndarray) -> int:
    """Fine cells per beam cell: an odd number of at least three, so that one is central."""
    count = int(numbers.max() - numbers.min()) + 1
    return max(3, 2 * math.ceil((_ACROSS / count - 1) / 2) + 1)


def _window(count: int, shape: tuple[int, ...], grid: RangeGrid, finer: tuple[int, int]) -> tuple[int, int]:
    """Return the largest gap to close: three times the mean point distance if half of the points face the sensor."""
    tall = (grid.highest - grid.lowest) / (grid.rows * finer[0])
    wide = 2 * math.pi / (grid.columns * finer[1])
    spacing = math.sqrt(shape[0] * tall * shape[1] * wide / max(count / 2, 1))
    rows = min(1.5 * spacing / tall, 4 * finer[0])
    columns = min(1.5 * spacing / wide, 12 * finer[1])
    return 2 * math.ceil(rows) + 1, 2 * math.ceil(columns) + 1


def _closed(image: np.ndarray, window: tuple[int, int], begin: tuple[int, int], every: tuple[int, int]) -> np.ndarray:
    """Grey-scale closing of an image as in `close_gaps`, but only at the beams."""
    image = np.pad(image, [(0, 0), (window[1] - 1, window[1] - 1)])
    image = _running(image, window[1], 1, np.maximum)
    image = np.pad(image, [(window[0] - 1, window[0] - 1), (0, 0)])
    image = _running(image, window[0], 0, np.maximum)
    image = _running(image, window[0], 0, np.minimum)[begin[0] :: every[0]]
    return _running(image, window[1], 1, np.minimum)[:, begin[1] :: every[1]]


def _running(
    image: np.ndarray, window: int, axis: int, extreme: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """The extremum of each window along an axis, from windows half as wide, a quarter, and so on."""
    done = 1
    while done < window:
        step = min(done, window - done)
        image = extreme(image[:-step], image[step:]) if axis == 0 else extreme(image[:, :-step], image[:, step:])
        done += step
    return image


def _nearest_number(numbers: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The index in ``numbers`` of the closest value to each wanted one; the first among ties."""
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    after = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    before = np.maximum(after - 1, 0)
    nearer = np.abs(wanted - ordered[before]) < np.abs(ordered[after] - wanted)
    return np.asarray(order[np.where(nearer, before, after)])
