"""The ground height at a place, from the points around it."""

import torch
from torch import Tensor

from lightning_plugins._checks import check_positive_number
from lightning_plugins.functional.boxes import check_points
from lightning_plugins.functional.tensors import check_bools, check_floating, check_shape, check_together


def ground_height(points: Tensor, places: Tensor, valid: Tensor | None = None, *, radius: float = 3.0) -> Tensor:
    """Fit a plane to the low points around each place and return its height there.

    Least squares over the points within the radius; points more than 0.1 m above the plane are dropped and the plane is
    fitted again, which removes objects and walls; the last fit uses the points within 0.2 m on either side.

    Args:
        points: Shape ``(..., N, C)``, x, y and z first.
        places: x and y of the places, shape ``(..., S, 2)``.
        valid: Boolean tensor of shape ``(..., N)``, false for padding.
        radius: In metres.

    Returns:
        Heights of shape ``(..., S)``; NaN if fewer than five points are left.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a shape is wrong or the radius is not above 0.

    Example:
        >>> grid = torch.cartesian_prod(torch.arange(-3.0, 4.0), torch.arange(-3.0, 4.0))
        >>> slope = torch.cat([grid, 0.1 * grid[:, :1] - 1.7], dim=1)
        >>> round(ground_height(slope, torch.tensor([[1.0, 0.0]])).item(), 3)
        -1.6

    Source:
        Our own; the paper of whole-body augmentation keeps an object's old height at its new place.
    """
    check_points("points", points)
    check_floating("places", places)
    if places.ndim < 2 or places.shape[-1] != 2:
        raise ValueError(f"`places` must have shape (..., S, 2), got {tuple(places.shape)}")
    check_together("points", points.shape[:-2], "places", places.shape[:-2])
    check_positive_number("radius", radius)
    if valid is not None:
        check_bools("valid", valid)
        check_shape("valid", valid, points.shape[:-1])
    with torch.autocast(points.device.type, enabled=False):  # half precision resolves heights only to centimetres
        return _fitted(points, places, valid, radius)


def _fitted(points: Tensor, places: Tensor, valid: Tensor | None, radius: float) -> Tensor:
    x = points[..., None, :, 0] - places[..., :, None, 0]
    y = points[..., None, :, 1] - places[..., :, None, 1]
    near = x.square() + y.square() <= radius**2
    if valid is not None:
        near &= valid[..., None, :]
    height = points[..., None, :, 2].expand_as(x)
    design = torch.stack([x / radius, y / radius, torch.ones_like(x)], dim=-1)
    kept = near
    plane = design.new_zeros(*near.shape[:-1], 3)
    for step in range(7):
        weighted = design * kept[..., None]
        gram = weighted.transpose(-1, -2) @ design
        # A slope that the points do not determine is set to zero; the constant is fitted separately
        gram = gram + torch.diag_embed(gram.new_tensor([1e-3, 1e-3, 0.0]) * gram[..., 2:, 2].clamp_min(1.0))
        gram[..., 2, 2] = gram[..., 2, 2].clamp_min(1e-6)
        plane = torch.linalg.solve(gram, (weighted * height[..., None]).sum(-2))
        if step < 6:
            above = height - (design * plane[..., None, :]).sum(-1)
            kept = near & (above < 0.1 if step < 5 else above.abs() < 0.2)
    return torch.where(kept.sum(-1) >= 5, plane[..., 2], torch.nan)
