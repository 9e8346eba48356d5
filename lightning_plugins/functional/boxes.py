"""Boxes ``x, y, z, dx, dy, dz, yaw`` (centre, full sizes, heading about z, which points up) and the points in them."""

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from lightning_plugins._checks import check_bool, check_finite_number, shown
from lightning_plugins.functional.tensors import (
    check_dims,
    check_floating,
    check_leading,
    check_real,
    check_shape,
    check_together,
)


def rotate_z(points: Tensor, angle: Tensor | float) -> Tensor:
    """Rotate points about the z axis, counter-clockwise seen from above.

    Args:
        points: Shape ``(..., N, C)``, x and y first; other columns are unchanged.
        angle: Radians, of shape ``(...)`` or a single number.

    Returns:
        New tensor of the shape of ``points``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a shape is wrong.

    Example:
        >>> rotate_z(torch.tensor([[1.0, 0.0, 5.0]]), torch.pi / 2).round(decimals=4).tolist()
        [[-0.0, 1.0, 5.0]]
    """
    check_floating("points", points)
    check_dims("points", points, 2, "(..., N, C)")
    if points.shape[-1] < 2:
        raise ValueError(f"`points` must have shape (..., N, 2 or more), got {tuple(points.shape)}")
    if isinstance(angle, Tensor):
        check_real("angle", angle)
        if angle.ndim:
            check_leading("angle", angle.shape, "points", points.shape[:-2])
    else:
        check_finite_number("angle", angle)
    angle = torch.as_tensor(angle, dtype=points.dtype, device=points.device)[..., None]
    cos, sin = angle.cos(), angle.sin()
    x, y = points[..., 0], points[..., 1]
    return torch.cat([(x * cos - y * sin)[..., None], (x * sin + y * cos)[..., None], points[..., 2:]], dim=-1)


def points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Tell which points lie in which boxes; a point on a face is inside.

    Args:
        points: Shape ``(..., N, C)`` with x, y and z first.
        boxes: Shape ``(..., M, 7)``.

    Returns:
        Boolean tensor of shape ``(..., N, M)``.

    Raises:
        ValueError: If a shape is wrong.

    Example:
        >>> box = torch.tensor([[0.0, 0.0, 0.0, 4.0, 2.0, 2.0, torch.pi / 2]])
        >>> points_in_boxes(torch.tensor([[0.0, 1.9, 0.0], [1.9, 0.0, 0.0]]), box).tolist()
        [[True], [False]]
    """
    check_points("points", points)
    check_boxes("boxes", boxes)
    check_together("points", points.shape[:-2], "boxes", boxes.shape[:-2])
    x, y, z = (points[..., :, None, i] - boxes[..., None, :, i] for i in range(3))
    cos, sin = boxes[..., None, :, 6].cos(), boxes[..., None, :, 6].sin()
    half = boxes[..., None, :, 3:6] / 2
    along, across = x * cos + y * sin, y * cos - x * sin
    return (along.abs() <= half[..., 0]) & (across.abs() <= half[..., 1]) & (z.abs() <= half[..., 2])


def bev_overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """Tell which boxes overlap in bird's-eye view: rotated rectangles, by separating axes.

    Rectangles that only touch do not overlap.

    Args:
        boxes: Shape ``(..., N, 7)``.
        others: Shape ``(..., M, 7)``.

    Returns:
        Boolean tensor of shape ``(..., N, M)``.

    Raises:
        ValueError: If a shape is wrong.

    Example:
        >>> a = torch.tensor([[0.0, 0.0, 0.0, 4.0, 2.0, 2.0, 0.0]])
        >>> b = torch.tensor([[0.0, 1.5, 9.0, 4.0, 2.0, 2.0, 0.0], [0.0, 2.0, 0.0, 4.0, 2.0, 2.0, 0.0]])
        >>> bev_overlap(a, b).tolist()
        [[True, False]]
    """
    check_boxes("boxes", boxes)
    check_boxes("others", others)
    check_together("boxes", boxes.shape[:-2], "others", others.shape[:-2])
    a, b = boxes[..., :, None, :], others[..., None, :, :]
    x, y, turn = b[..., 0] - a[..., 0], b[..., 1] - a[..., 1], b[..., 6] - a[..., 6]
    cos, sin = turn.cos().abs(), turn.sin().abs()
    inside = torch.ones_like(x, dtype=torch.bool)
    for first, second in ((a, b), (b, a)):  # the axes of both rectangles
        c, s = first[..., 6].cos(), first[..., 6].sin()
        length, width = second[..., 3], second[..., 4]
        inside &= (x * c + y * s).abs() < (first[..., 3] + length * cos + width * sin) / 2
        inside &= (y * c - x * s).abs() < (first[..., 4] + length * sin + width * cos) / 2
    return inside


def part_occupancy(points: Tensor, size: Tensor, parts: tuple[int, int, int], *, mirror: bool = True) -> Tensor:
    """Count an object's points in equal parts of its box.

    Args:
        points: Shape ``(N, C)``, x, y and z first, in the frame of the box: its centre is the origin, its length lies
            along x. A point outside the box is assigned to the nearest part.
        size: Lengths of the box along x, y and z, shape ``(3,)``.
        parts: Number of parts along x, y and z.
        mirror: Whether to count the mirror image of each point in y as well, for symmetric objects.

    Returns:
        Counts of shape ``parts``, int64; they sum to ``N``, or ``2 N`` with mirror images.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a shape is wrong, or a number of parts is less than 1.

    Example:
        >>> points = torch.tensor([[0.9, 0.4, 0.0], [-0.9, -0.4, 0.0]])
        >>> part_occupancy(points, torch.tensor([2.0, 1.0, 1.0]), (2, 2, 1)).flatten().tolist()
        [1, 1, 1, 1]

    Source:
        Shin et al., AAAI 2023, https://arxiv.org/abs/2303.12743.
    """
    check_points("points", points)
    if points.ndim != 2:
        raise ValueError(f"`points` must have shape (N, 3 or more), got {tuple(points.shape)}")
    check_floating("size", size)
    check_shape("size", size, (3,))
    check_bool("mirror", mirror)
    if not isinstance(parts, Sequence) or isinstance(parts, str | bytes) or len(parts) != 3:
        raise TypeError(f"`parts` must be three numbers of at least 1, got {shown(parts)}")
    if not all(isinstance(number, int | Integral) and number >= 1 for number in parts):
        raise ValueError(f"`parts` must be three numbers of at least 1, got {parts!r}")
    if math.prod(parts) > 2**31:
        raise ValueError(f"`parts` must be few enough to count in, got {parts!r}")
    xyz = points[:, :3]
    if mirror:
        xyz = torch.cat([xyz, xyz * xyz.new_tensor([1.0, -1.0, 1.0])])
    numbers = xyz.new_tensor(parts)
    place = ((xyz / size.clamp_min(1e-9) + 0.5) * numbers).floor().clamp_min(0).minimum(numbers - 1).long()
    flat = (place[:, 0] * parts[1] + place[:, 1]) * parts[2] + place[:, 2]
    return torch.bincount(flat, minlength=parts[0] * parts[1] * parts[2]).reshape(parts)


def check_points(name: str, points: Tensor) -> None:
    """Raise an error unless the last dimension has x, y and z.

    Raises:
        ValueError: If the shape is wrong.
        TypeError: If it is not a floating tensor.
    """
    check_floating(name, points)
    if points.ndim < 2 or points.shape[-1] < 3:
        raise ValueError(f"`{name}` must have shape (..., N, 3 or more), got {tuple(points.shape)}")


def check_boxes(name: str, boxes: Tensor) -> None:
    """Raise an error unless the last dimension has the seven numbers of a box.

    Raises:
        TypeError: If it is not a floating tensor.
        ValueError: If the shape is wrong.
    """
    check_floating(name, boxes)
    if boxes.ndim < 2 or boxes.shape[-1] != 7:
        raise ValueError(f"`{name}` must have shape (..., M, 7) for x, y, z, dx, dy, dz, yaw, got {tuple(boxes.shape)}")
