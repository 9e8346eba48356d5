"""A spinning sensor over a scene of simple shapes, with exact intersections and hence exact occlusion."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lightning_plugins._arguments import check_arguments
from lightning_plugins._checks import check_finite_number, check_fraction, check_positive_int
from lightning_plugins.functional.range_image import RangeGrid

_FLAT = 1e-12


@dataclass(frozen=True)
class SpinningSensor:
    """A sensor at the origin with a vertical fan of beams that rotates about z.

    Args:
        beams: Number of beams, 16 to 64.
        columns: Azimuths per revolution.
        lowest: Elevation of the lowest beam, degrees.
        highest: Elevation of the highest.
        height: Height of the sensor above the ground, metres.
        reach: Maximum range, metres.
        noise: Standard deviation of the range, metres.
        dropout: Fraction of lost returns.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If an argument is of the wrong type.
    """

    beams: int = 32
    columns: int = 1024
    lowest: float = -22.0
    highest: float = 3.0
    height: float = 1.73
    reach: float = 80.0
    noise: float = 0.02
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_arguments(SpinningSensor, vars(self))
        if not 16 <= check_positive_int("beams", self.beams) <= 64:
            raise ValueError(f"`beams` must be from 16 to 64, got {self.beams}")
        check_positive_int("columns", self.columns)
        check_fraction("dropout", self.dropout)
        for name in ("lowest", "highest", "height", "reach", "noise"):
            check_finite_number(name, getattr(self, name))
        if not -90 < self.lowest < self.highest < 90:
            raise ValueError(
                f"`lowest` and `highest` are elevations in degrees, rising, got {self.lowest!r} and {self.highest!r}"
            )
        for name in ("height", "reach", "noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)!r}")

    @property
    def grid(self) -> RangeGrid:
        """The grid of the beams: each beam passes through the centre of a cell."""
        half = math.radians(self.highest - self.lowest) / (self.beams - 1) / 2
        return RangeGrid(self.beams, self.columns, math.radians(self.lowest) - half, math.radians(self.highest) + half)

    def directions(self) -> np.ndarray:
        """Return the unit vectors of the beams, shape ``(beams, columns, 3)``, in the order of the grid's cells."""
        elevation = np.radians(np.linspace(self.lowest, self.highest, self.beams))[:, None]
        azimuth = ((np.arange(self.columns) + 0.5) / self.columns - 0.5)[None] * 2 * np.pi
        level = np.cos(elevation)
        parts = (level * np.cos(azimuth), level * np.sin(azimuth), np.sin(elevation))
        return np.stack([np.broadcast_to(part, (self.beams, self.columns)) for part in parts], axis=-1)


@dataclass(frozen=True)
class Shape:
    """A shape in a scene.

    Args:
        box: ``x, y, z, dx, dy, dz, yaw``; for a cylinder ``dx`` is the diameter, for a mesh the box is its bounding
            box.
        kind: ``"box"``, ``"cylinder"`` (upright) or ``"mesh"``.
        label: Class of an object; None for scenery.
        triangles: For a mesh: corners of shape ``(t, 3, 3)``, relative to the box and its centre, -0.5 to 0.5.
        reflectance: Fourth column of its points.
    """

    box: tuple[float, float, float, float, float, float, float]
    kind: str = "box"
    label: str | None = None
    triangles: np.ndarray | None = None
    reflectance: float = 0.5


@dataclass(frozen=True)
class Scan:
    """One revolution of the sensor.

    Attributes:
        points: Shape ``(n, 4)``: x, y, z and reflectance, float32.
        hit: Index of the shape that each point lies on; -1 for the ground.
        cells: The cell of the sensor's grid of each point.
    """

    points: np.ndarray
    hit: np.ndarray
    cells: np.ndarray = field(repr=False)


def scan(shapes: Sequence[Shape], sensor: SpinningSensor, rng: np.random.Generator | None = None) -> Scan:
    """Cast every beam at the ground and all shapes, and return the nearest hits.

    Args:
        shapes: The shapes.
        sensor: The sensor.
        rng: For noise and lost returns; None for neither.

    Returns:
        The scan.

    Example:
        >>> wall = Shape((10.0, 0.0, 0.0, 1.0, 4.0, 4.0, 0.0), reflectance=0.9)
        >>> found = scan([wall], SpinningSensor())
        >>> round(float(found.points[found.hit == 0, 0].min()), 4)
        9.5
    """
    check_arguments(scan, locals())
    rays = sensor.directions().reshape(-1, 3)
    azimuth = np.arctan2(rays[:, 1], rays[:, 0])
    down = rays[:, 2] < -_FLAT
    ranges = np.full(len(rays), np.inf)
    ranges[down] = -sensor.height / rays[down, 2]
    hit = np.full(len(rays), -1)
    for number, shape in enumerate(shapes):
        near = np.flatnonzero(_towards(shape, azimuth))
        distance = _distance(shape, rays[near])
        nearer = distance < ranges[near]
        ranges[near[nearer]], hit[near[nearer]] = distance[nearer], number
    kept = ranges <= sensor.reach
    if rng is not None:
        ranges = ranges + sensor.noise * rng.standard_normal(len(ranges))
        kept &= rng.random(len(ranges)) >= sensor.dropout
    cells = np.flatnonzero(kept)
    points = rays[cells] * ranges[cells, None]
    reflectance = np.array([*(shape.reflectance for shape in shapes), 0.2])[hit[cells]]  # the ground's at -1
    return Scan(np.column_stack([points, reflectance]).astype(np.float32), hit[cells], cells)


def _towards(shape: Shape, azimuth: np.ndarray) -> np.ndarray:
    """Return whether a ray may hit the circle around a shape."""
    x, y, _, length, width, *_ = shape.box
    distance, radius = math.hypot(x, y), math.hypot(length, width) / 2
    if distance <= radius:
        return np.ones(len(azimuth), dtype=bool)
    away = np.abs((azimuth - math.atan2(y, x) + np.pi) % (2 * np.pi) - np.pi)
    return away <= math.asin(radius / distance) + 1e-6


def _distance(shape: Shape, rays: np.ndarray) -> np.ndarray:
    """Range at which each ray enters a shape; infinity where it does not."""
    x, y, z, length, width, height, yaw = shape.box
    cos, sin = math.cos(yaw), math.sin(yaw)
    turn = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    origin, local = -np.array([x, y, z]) @ turn, rays @ turn
    half = np.array([length, width, height]) / 2
    if shape.kind == "mesh" and shape.triangles is not None:
        return _enter_mesh(origin, local, shape.triangles * (2 * half))
    local = np.where(np.abs(local) < _FLAT, _FLAT, local)
    if shape.kind == "cylinder":
        return _enter_cylinder(origin, local, half[0], half[2])
    return _enter_slabs(origin, local, half)


def _enter_slabs(origin: np.ndarray, rays: np.ndarray, half: np.ndarray) -> np.ndarray:
    ends = np.stack([(-half - origin) / rays, (half - origin) / rays])
    enter, leave = ends.min(axis=0).max(axis=1), ends.max(axis=0).min(axis=1)
    return np.where((enter <= leave) & (enter > 0), enter, np.inf)


def _enter_cylinder(origin: np.ndarray, rays: np.ndarray, radius: float, half: float) -> np.ndarray:
    a = (rays[:, :2] ** 2).sum(axis=1)
    b = rays[:, :2] @ origin[:2]
    root = b**2 - a * ((origin[:2] ** 2).sum() - radius**2)
    side = np.sqrt(np.maximum(root, 0.0))
    low, high = (-half - origin[2]) / rays[:, 2], (half - origin[2]) / rays[:, 2]
    enter = np.maximum((-b - side) / a, np.minimum(low, high))
    leave = np.minimum((-b + side) / a, np.maximum(low, high))
    return np.where((root >= 0) & (enter <= leave) & (enter > 0), enter, np.inf)


def _enter_mesh(origin: np.ndarray, rays: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Nearest hit of any triangle, from either side (Möller and Trumbore)."""
    nearest = np.full(len(rays), np.inf)
    for a, b, c in triangles:
        across = np.cross(rays, c - a)
        determinant = across @ (b - a)
        safe = np.where(np.abs(determinant) < _FLAT, np.inf, determinant)
        u = across @ (origin - a) / safe
        normal = np.cross(origin - a, b - a)
        v, distance = rays @ normal / safe, normal @ (c - a) / safe
        inside = (u >= 0) & (v >= 0) & (u + v <= 1) & (distance > 0) & np.isfinite(safe)
        nearest = np.where(inside & (distance < nearest), distance, nearest)
    return nearest


def prism(profile: Sequence[tuple[float, float]]) -> np.ndarray:
    """Create a closed mesh by extruding a convex profile in x and z along y.

    Args:
        profile: Corners in order, relative to the box and its centre, -0.5 to 0.5.

    Returns:
        Triangles of shape ``(t, 3, 3)``.
    """
    check_arguments(prism, locals())
    left = [(x, 0.5, z) for x, z in profile]
    right = [(x, -0.5, z) for x, z in profile]
    triangles: list[Any] = []
    for side in (left, right):
        triangles += [(side[0], side[i], side[i + 1]) for i in range(1, len(side) - 1)]
    for i in range(len(profile)):
        j = (i + 1) % len(profile)
        triangles += [(left[i], left[j], right[i]), (right[i], left[j], right[j])]
    return np.array(triangles)
