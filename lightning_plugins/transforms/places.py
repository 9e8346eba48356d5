"""Free places, the ground under them, and the points in boxes, without scanning the whole frame per object."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_plugins.functional.boxes import bev_overlap

_CELL, _CELLS = 3.0, 128  # metres and cells along x and along y; points beyond are assigned to the outermost cells


class BirdsEye:
    """A point cloud sorted into square cells in bird's-eye view, for neighbour queries at many places.

    Args:
        points: Shape ``(n, 3 or more)``, on the CPU.
    """

    def __init__(self, points: Tensor) -> None:
        self.points = points.numpy()
        # 16 bits, which NumPy sorts in linear time
        keys = _cell(self.points[:, 0]) * np.int16(_CELLS) + _cell(self.points[:, 1])
        self._order = np.argsort(keys, kind="stable")
        self._starts = np.concatenate([[0], np.bincount(keys, minlength=_CELLS**2).cumsum()])

    def near(self, places: np.ndarray, reach: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find points near places.

        Args:
            places: x and y, shape ``(s, 2)``.
            reach: Half the side of a square around each place, metres.

        Returns:
            Indices of all points in the squares, possibly with other nearby points, and the index of the place of each.
        """
        wide = np.reshape(1.0001 * np.asarray(reach, dtype=np.float64) + 1e-3, (-1, 1))  # none is lost to rounding
        low, high = _cell(places - wide).tolist(), _cell(places + wide).tolist()
        found = [
            np.concatenate(
                [
                    self._order[self._starts[row * _CELLS + left] : self._starts[row * _CELLS + right + 1]]
                    for row in range(top, bottom + 1)
                ]
            )
            for (top, left), (bottom, right) in zip(low, high, strict=True)
        ]
        rows = np.concatenate([*found, np.zeros(0, dtype=np.int64)])
        return rows, np.repeat(np.arange(len(found)), [len(rows) for rows in found])

    def inside(self, boxes: Tensor) -> Tensor:
        """Tell which points lie in any of some boxes.

        Args:
            boxes: Shape ``(m, 7)``.

        Returns:
            Boolean tensor of shape ``(n,)``.
        """
        cos, sin, wide = boxes[:, 6].cos().numpy(), boxes[:, 6].sin().numpy(), boxes.numpy()
        rows, own = self.near(wide[:, :2], np.hypot(wide[:, 3], wide[:, 4]) / 2)
        x, y, z = (self.points[rows, axis] - wide[own, axis] for axis in range(3))
        along, across = x * cos[own] + y * sin[own], y * cos[own] - x * sin[own]
        half = wide[:, 3:6] / 2
        held = (np.abs(along) <= half[own, 0]) & (np.abs(across) <= half[own, 1]) & (np.abs(z) <= half[own, 2])
        result = np.zeros(len(self.points), dtype=bool)
        result[rows[held]] = True
        return torch.from_numpy(result)

    def ground(self, places: np.ndarray, radius: float = 3.0) -> np.ndarray:
        """Find the ground height under places, like `lightning_plugins.functional.ground_height`.

        Args:
            places: x and y, shape ``(s, 2)``.
            radius: In metres.

        Returns:
            Heights of shape ``(s,)``; NaN where fewer than five points are left.
        """
        rows, own = self.near(places, radius)
        x, y, z = (self.points[rows, axis].astype(np.float64) for axis in range(3))
        x, y = (x - places[own, 0]) / radius, (y - places[own, 1]) / radius
        close = (x**2 + y**2 <= 1) & np.isfinite(z)
        counts = np.bincount(own[close], minlength=len(places))
        known = np.flatnonzero(counts >= 5)
        close &= counts[own] >= 5
        heights = np.full(len(places), np.nan)
        if len(known):
            heights[known] = _plane_heights(x[close], y[close], z[close], counts[known])
        return heights


def _cell(values: np.ndarray) -> np.ndarray:
    """Cell indices along an axis, with the sensor in the middle; non-finite values are assigned to the first."""
    return np.clip(np.nan_to_num(values / _CELL, nan=-np.inf) + _CELLS / 2, 0, _CELLS - 1).astype(np.int16)


def _plane_heights(x: np.ndarray, y: np.ndarray, z: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Heights at x = y = 0 of planes through the low points of groups, which are stored consecutively."""
    starts, group = np.cumsum(counts) - counts, np.repeat(np.arange(len(counts)), counts)
    one = np.ones_like(x)
    products = np.stack([x * x, x * y, x, y * y, y, one, x * z, y * z, z])
    kept, plane = one, np.zeros((len(counts), 3))
    for step in range(7):
        sums = np.add.reduceat(products * kept, starts, axis=1)
        gram, right = sums[[0, 1, 2, 1, 3, 4, 2, 4, 5]].T.reshape(-1, 3, 3).copy(), sums[6:].T[..., None]
        for axis in range(2):  # a slope that the points do not determine is set to zero
            gram[:, axis, axis] += 1e-3 * np.maximum(sums[5], 1.0)
        gram[:, 2, 2] = np.maximum(gram[:, 2, 2], 1e-6)
        plane = np.linalg.solve(gram, right)[..., 0]
        if step < 6:
            above = z - (x * plane[group, 0] + y * plane[group, 1] + plane[group, 2])
            kept = (above < 0.1 if step < 5 else np.abs(above) < 0.2).astype(np.float64)
    return np.where(np.add.reduceat(kept, starts) >= 5, plane[:, 2], np.nan)


def first_free(boxes: Tensor, taken: Sequence[Tensor]) -> int | None:
    """Find the first box that overlaps none of the taken boxes in bird's-eye view.

    Args:
        boxes: Shape ``(t, 7)``.
        taken: Boxes of shape ``(7,)``.

    Returns:
        Its index, or None.
    """
    if not taken:
        return 0
    others = torch.stack(list(taken)).to(boxes)
    ours, theirs = boxes.numpy(), others.numpy()
    reach = np.hypot(ours[:, 3], ours[:, 4])[:, None] / 2 + np.hypot(theirs[:, 3], theirs[:, 4]) / 2
    apart = np.hypot(*(ours[:, None, axis] - theirs[:, axis] for axis in range(2)))
    close = apart <= 1.001 * reach + 1e-3  # circumscribed circles overlap; the others need no exact test
    alone = np.flatnonzero(~close.any(axis=1))
    before = int(alone[0]) if len(alone) else len(boxes)
    if before:
        free = ~bev_overlap(boxes[:before], others[torch.from_numpy(close[:before].any(axis=0))]).any(dim=1)
        if free.any():
            return int(free.int().argmax())
    return before if len(alone) else None
