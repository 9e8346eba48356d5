"""Figures of point clouds: bird's-eye and range view, with inserted and hidden points highlighted."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_plugins._arguments import check_arguments
from lightning_plugins.plots.style import COLOURS, INK, MUTED, empty_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OWN, _ADDED, _HIDDEN = "#9a9a9a", COLOURS[0], COLOURS[1]


def point_cloud_figure(before: Mapping[str, Any], after: Mapping[str, Any], *, title: str | None = None) -> "Figure":
    """Draw a frame before and after an augmentation, in bird's-eye and range view.

    Args:
        before: ``points`` (n, 3 or more) and ``boxes`` (m, 7), NumPy or torch.
        after: The augmented frame, with a ``source`` per point, -1 for the frame's own. Points of ``before`` that are
            missing there are drawn as hidden.
        title: Title of the figure.

    Returns:
        A figure with an Agg canvas: bird's-eye views above, range views below, before on the left.

    Raises:
        ValueError: If ``after`` has no ``source``.
        ImportError: If matplotlib is missing.

    Example:
        >>> frame = {"points": torch.rand(9, 3), "boxes": torch.zeros(0, 7)}
        >>> figure = point_cloud_figure(frame, {**frame, "source": torch.full((9,), -1)})
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['before', 'after', 'before, range view', 'after, range view']
    """
    check_arguments(point_cloud_figure, locals())
    if "source" not in after:
        raise ValueError(f"`after` must have a `source` per point, as transforms return it, got {sorted(after)}")
    for name, frame in (("before", before), ("after", after)):
        if missing := [key for key in ("points", "boxes") if key not in frame]:
            raise ValueError(f"`{name}` must have `points` and `boxes`, got {sorted(frame)} without {missing}")
    old, new = torch.as_tensor(before["points"]), torch.as_tensor(after["points"])
    added = torch.as_tensor(after["source"]) >= 0
    kept = {tuple(point) for point in new[~added, :3].tolist()}
    hidden = torch.tensor([tuple(point) not in kept for point in old[:, :3].tolist()], dtype=torch.bool)
    figure = empty_figure(width=11.0, height=8.0, title=title)
    grid = figure.subplots(2, 2, height_ratios=(3, 1))
    groups = (
        [("frame", old[~hidden], _OWN), ("hidden or replaced", old[hidden], _HIDDEN)],
        [("frame", new[~added], _OWN), ("inserted", new[added], _ADDED)],
    )
    for column, (name, boxes) in enumerate((("before", before["boxes"]), ("after", after["boxes"]))):
        _bird(grid[0, column], groups[column], torch.as_tensor(boxes), name)
        _range(grid[1, column], groups[column], f"{name}, range view")
    return figure


def _bird(axes: "Axes", groups: list[tuple[str, Tensor, str]], boxes: Tensor, name: str) -> None:
    style_axes(axes, "x (m)", "y (m)")
    axes.set_title(name, loc="left", fontsize=11, color=INK)
    for label, points, colour in groups:
        x, y = points[:, 0].numpy(), points[:, 1].numpy()
        axes.scatter(x, y, s=0.6, color=colour, linewidths=0, label=label, rasterized=True)
    for left, near, _, length, width, _, yaw in boxes.tolist():
        corners = [(1, 1), (1, -1), (-1, -1), (-1, 1), (1, 1)]
        along = [(a * length / 2, b * width / 2) for a, b in corners]
        cos, sin = math.cos(yaw), math.sin(yaw)
        turned = [(left + a * cos - b * sin, near + a * sin + b * cos) for a, b in along]
        axes.plot(*zip(*turned, strict=True), color=MUTED, linewidth=0.8)
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(frameon=False, fontsize=9, markerscale=8, loc="upper right")


def _range(axes: "Axes", groups: list[tuple[str, Tensor, str]], name: str) -> None:
    style_axes(axes, "azimuth (°)", "elevation (°)")
    axes.set_title(name, loc="left", fontsize=10, color=INK)
    for _, points, colour in groups:
        azimuth = torch.atan2(points[:, 1], points[:, 0]).rad2deg()
        elevation = torch.atan2(points[:, 2], points[:, :2].norm(dim=1)).rad2deg()
        axes.scatter(azimuth.numpy(), elevation.numpy(), s=0.4, color=colour, linewidths=0, rasterized=True)
