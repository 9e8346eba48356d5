"""Range images of a spinning sensor: the nearest point in each beam's cell, batched and on any device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_finite_number, check_instance, check_positive_int, shown
from lightning_plugins.functional.boxes import check_points
from lightning_plugins.functional.tensors import check_bools, check_dims, check_floating, check_integers, check_shape


@dataclass(frozen=True)
class RangeGrid:
    """The grid of a spinning sensor's beams, seen from the origin.

    Args:
        rows: Number of beams, stacked vertically.
        columns: Number of azimuths per revolution.
        lowest: Lower edge of the lowest row, radians of elevation.
        highest: Upper edge of the highest row.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> RangeGrid(rows=2, columns=4, lowest=-0.4, highest=0.4).cells(torch.tensor([[10.0, 1.0, 1.0]]))[0].tolist()
        [6]
    """

    rows: int
    columns: int
    lowest: float
    highest: float

    def __post_init__(self) -> None:
        check_positive_int("rows", self.rows)
        check_positive_int("columns", self.columns)
        for name in ("lowest", "highest"):
            if abs(check_finite_number(name, getattr(self, name))) > math.pi / 2:
                value = getattr(self, name)
                raise ValueError(
                    f"`{name}` is an elevation in radians, between -pi/2 and pi/2, got {value!r}; did you mean "
                    f"{math.radians(value):.4f}?"
                )
        if self.lowest >= self.highest:
            raise ValueError(f"`lowest` must be below `highest`, got {self.lowest!r} and {self.highest!r}")

    def cells(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cell indices of points.

        Args:
            points: Shape ``(..., N, C)``, x, y and z first.

        Returns:
            The cell, ``row * columns + column``, of each point, -1 for points above or below the grid or at the origin;
            and the range of each point. Both of shape ``(..., N)``.
        """
        up, around, distance = self.shares(points)
        row = (up * self.rows).floor()
        column = (around * self.columns).long() % self.columns
        inside = (row >= 0) & (row < self.rows) & (distance > 0)
        return torch.where(inside, row.nan_to_num().long() * self.columns + column, -1), distance

    def shares(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return relative grid positions of points, for grids of any resolution with these edges.

        Args:
            points: Shape ``(..., N, C)``, x, y and z first.

        Returns:
            The fraction of the way from the lowest to the highest edge, the fraction of a turn from azimuth -pi, and
            the range, each of shape ``(..., N)``. A fraction times the number of rows or columns, rounded down, is the
            cell.
        """
        check_points("points", points)
        x, y, z = points[..., 0], points[..., 1], points[..., 2]
        level = torch.hypot(x, y)
        up = (torch.atan2(z, level) - self.lowest) / (self.highest - self.lowest)
        return up, torch.atan2(y, x) / (2 * math.pi) + 0.5, torch.hypot(level, z)


def check_grid(grid: RangeGrid) -> None:
    """Raise an error for an invalid grid."""
    check_instance("grid", grid, RangeGrid, "a RangeGrid")


def _check_window(window: tuple[int, int], grid: RangeGrid) -> None:
    what = f"two odd numbers, of rows and columns, at most {grid.rows} and {grid.columns}"
    if not isinstance(window, Sequence) or isinstance(window, str | bytes) or len(window) != 2:
        raise TypeError(f"`window` must be {what}, got {shown(window)}")
    for number, most in zip(window, (grid.rows, grid.columns), strict=True):
        if check_positive_int("window", number) % 2 == 0 or number > max(most, 1):
            raise ValueError(f"`window` must be {what}, got {window!r}")


def nearest_ranges(cells: Tensor, ranges: Tensor, grid: RangeGrid) -> Tensor:
    """Take the smallest range in each cell of a grid.

    Args:
        cells: Cells of the points, shape ``(..., N)``; -1, or any invalid cell, for points to ignore.
        ranges: Ranges of the points, of the same shape.
        grid: The grid.

    Returns:
        Shape ``(..., rows * columns)``, infinity where no point is.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the shapes differ.

    Example:
        >>> grid = RangeGrid(rows=1, columns=3, lowest=-0.1, highest=0.1)
        >>> nearest_ranges(torch.tensor([1, 1, -1]), torch.tensor([5.0, 4.0, 1.0]), grid).tolist()
        [inf, 4.0, inf]
    """
    check_floating("ranges", ranges)
    check_integers("cells", cells)
    check_dims("ranges", ranges, 1, "(..., N)")
    check_shape("cells", cells, ranges.shape)
    check_grid(grid)
    image = ranges.new_full((*ranges.shape[:-1], grid.rows * grid.columns + 1), math.inf)
    count = grid.rows * grid.columns
    index = torch.where((cells < 0) | (cells > count), count, cells).long()  # an extra cell, removed below
    return image.scatter_reduce(-1, index, ranges, "amin")[..., :-1]


def visible_in_range_image(
    points: Tensor, grid: RangeGrid, valid: Tensor | None = None, *, tolerance: float = 0.3
) -> Tensor:
    """Find the points not hidden by a nearer point in the same beam's cell.

    Points above or below the grid and a point at the origin are visible and hide nothing.

    Args:
        points: Shape ``(..., N, C)``, x, y and z first; leading dimensions are batches.
        grid: The sensor's cells.
        valid: Boolean tensor of shape ``(..., N)``, false for padding, which is never visible.
        tolerance: Distance behind the nearest point at which others are still visible, in metres.

    Returns:
        Boolean tensor of shape ``(..., N)``.

    Raises:
        ValueError: If a shape is wrong or ``tolerance`` is negative.

    Example:
        >>> grid = RangeGrid(rows=64, columns=1024, lowest=-0.4, highest=0.1)
        >>> points = torch.tensor([[10.0, 0.01, 0.0], [20.0, 0.02, 0.0], [20.0, 5.0, 0.0]])
        >>> visible_in_range_image(points, grid).tolist()
        [True, False, True]
    """
    check_grid(grid)
    if check_finite_number("tolerance", tolerance) < 0:
        raise ValueError(f"`tolerance` must be at least 0, got {tolerance!r}")
    cells, ranges = grid.cells(points)
    if valid is not None:
        check_bools("valid", valid)
        check_shape("valid", valid, cells.shape)
        cells = torch.where(valid, cells, -1)
    nearest = nearest_ranges(cells, ranges, grid)
    visible = (cells < 0) | (ranges <= nearest.gather(-1, cells.clamp_min(0)) + tolerance)
    return visible if valid is None else visible & valid


def close_gaps(image: Tensor, grid: RangeGrid, window: tuple[int, int] = (3, 5)) -> Tensor:
    """Close the gaps of a range image that are narrower than a window, in rows or columns.

    This is the grey-scale closing of the inverse range, so a gap may be empty or show a farther surface; convex
    outlines do not grow.

    Args:
        image: Shape ``(..., rows * columns)``, infinity where no point is.
        grid: The grid.
        window: Odd numbers of rows and columns, at most those of the grid.

    Returns:
        The closed image, of the same shape.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a shape is wrong, or the window is even or larger than the grid.

    Example:
        >>> grid = RangeGrid(rows=1, columns=7, lowest=-0.1, highest=0.1)
        >>> row = [math.inf, 4.0, math.inf, 4.0, 4.0, math.inf, math.inf]
        >>> close_gaps(torch.tensor(row), grid, (1, 3)).tolist()
        [inf, 4.0, 4.0, 4.0, 4.0, inf, inf]
    """
    check_floating("image", image)
    check_grid(grid)
    if image.ndim < 1 or image.shape[-1] != grid.rows * grid.columns:
        raise ValueError(
            f"`image` must have shape (..., {grid.rows * grid.columns}), a number for each cell of `grid`, got "
            f"{tuple(image.shape)}"
        )
    _check_window(window, grid)
    rows, columns = window[0] // 2, window[1] // 2
    near = (1 / image).reshape(-1, 1, grid.rows, grid.columns)
    # Columns wrap around; above and below the rows there is nothing
    wide = torch.cat([near[..., grid.columns - columns :], near, near[..., :columns]], dim=-1)
    wide = nn.functional.pad(wide, (0, 0, rows, rows))
    pool = nn.functional.max_pool2d  # separable: first along rows, then along columns, which is much cheaper
    grown = pool(pool(wide, (window[0], 1), 1, (rows, 0)), (1, window[1]), 1, (0, columns))
    closed = -pool(pool(-grown, (window[0], 1), 1), (1, window[1]), 1)
    return (1 / torch.maximum(closed, near)).reshape(image.shape)
