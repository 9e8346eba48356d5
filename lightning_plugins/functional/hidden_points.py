"""Hidden point removal by the convex hull of the spherical inversion; needs SciPy."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_plugins._checks import check_finite_number, shown
from lightning_plugins.functional.boxes import check_points
from lightning_plugins.functional.tensors import check_real


def hidden_points(points: Tensor, viewpoint: Tensor | Sequence[float], radius_factor: float = 100.0) -> Tensor:
    """Find the points visible from a viewpoint.

    With ``q`` the points relative to the viewpoint and ``R`` the radius, the visible points are the vertices of the
    convex hull of ``q + 2 (R - |q|) q / |q|`` and the viewpoint. The visible set grows with ``R``: a small factor thins
    sparse and distant surfaces, a large one makes occluded points visible.

    Degenerate clouds are handled: coincident points have the same visibility, points in a plane with the viewpoint are
    treated in that plane, of points on one ray the nearest is visible, and a point at the viewpoint is visible and
    hides nothing.

    Args:
        points: Shape ``(N, C)``, x, y and z first, finite.
        viewpoint: Three coordinates.
        radius_factor: ``R`` relative to the largest distance of a point, at least 1. Above 1e4 a warning is issued.

    Returns:
        Boolean tensor of shape ``(N,)``, on the device of ``points``; the hull is computed on the CPU in float64.

    Raises:
        ValueError: If a shape is wrong, a coordinate is not finite, or the factor is below 1.
        ImportError: If SciPy is missing.

    Example:
        >>> hidden_points(torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [1.0, 1.0, 0.0]]), (0.0, 0.0, 0.0)).tolist()
        [False, True, False]

    Source:
        Katz, Tal & Basri, Direct visibility of point sets, SIGGRAPH 2007.
    """
    check_points("points", points)
    centre = _coordinates(viewpoint)
    if points.ndim != 2 or centre.shape != (3,):
        raise ValueError(
            "`points` must have shape (N, 3 or more) and `viewpoint` three numbers, "
            f"got {tuple(points.shape)} and {tuple(centre.shape)}"
        )
    if check_finite_number("radius_factor", radius_factor) < 1:
        raise ValueError(f"`radius_factor` is a ratio to the range and must be at least 1, got {radius_factor!r}")
    if radius_factor > 1e12:
        raise ValueError(f"`radius_factor` must be at most 1e12, beyond which nothing is hidden, got {radius_factor!r}")
    if radius_factor > 1e4:
        warnings.warn(
            f"`radius_factor={radius_factor!r}` is a ratio to the range; above 1e4 hidden points count as visible",
            stacklevel=2,
        )
    q = points[:, :3].detach().to("cpu", torch.float64) - centre.cpu()
    if not bool(q.isfinite().all()):
        raise ValueError("`points` and `viewpoint` must be finite, got NaN or infinity; remove such points first")
    hidden = torch.zeros(len(q), dtype=torch.bool)
    distance = q.norm(dim=1)
    away = distance > 1e-9 * distance.max() if len(q) else hidden
    if away.any():
        unique, inverse = torch.unique(q[away] / distance.max(), dim=0, return_inverse=True)
        hidden[away] = ~_on_hull(_inverted(unique, radius_factor))[inverse]
    return hidden.to(points.device)


def _coordinates(viewpoint: Tensor | Sequence[float]) -> Tensor:
    if isinstance(viewpoint, Tensor):
        check_real("viewpoint", viewpoint)
        return viewpoint.to(torch.float64)
    if not isinstance(viewpoint, Sequence) or isinstance(viewpoint, str | bytes):
        raise TypeError(f"`viewpoint` must be three coordinates, got {shown(viewpoint)}")
    return torch.tensor([check_finite_number("viewpoint", number) for number in viewpoint], dtype=torch.float64)


def _inverted(q: Tensor, radius: float) -> Tensor:
    distance: Tensor = q.norm(dim=1, keepdim=True)
    return q * (2 * radius / distance - 1)


def _on_hull(points: Tensor) -> Tensor:
    """The vertices of the convex hull of the points and the origin, in the dimension of their span."""
    try:
        from scipy.spatial import ConvexHull, QhullError
    except ImportError as error:
        raise ImportError("hidden points need SciPy; run `pip install 'lightning-plugins[pointcloud]'`") from error

    visible = torch.zeros(len(points), dtype=torch.bool)
    values, axes = torch.linalg.eigh(points.T @ points / len(points))
    rank = int((values > 1e-12 * values[-1]).sum())
    if rank == 1:  # collinear with the origin: the far end of either side is the nearest point
        along = points @ axes[:, -1]
        visible[along.argmax()] |= along.max() > 0
        visible[along.argmin()] |= along.min() < 0
        return visible
    flat = torch.cat([points @ axes[:, 3 - rank :], points.new_zeros(1, rank)]).numpy()
    try:
        vertices = ConvexHull(flat).vertices
    except QhullError:  # nearly coplanar, beyond the precision: joggle the points, as Qhull advises
        vertices = ConvexHull(flat, qhull_options="QJ").vertices
    found = torch.as_tensor(vertices, dtype=torch.long)
    visible[found[found < len(points)]] = True
    return visible
