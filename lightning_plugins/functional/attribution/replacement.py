"""Patches of input positions, and their replacements."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins._checks import (
    check_bool,
    check_choice,
    check_finite_number,
    check_instance,
    check_non_negative_int,
    check_positive_int,
)
from lightning_plugins.functional.attribution.random import random_normal, random_uniform

REPLACEMENTS = ("zero", "mean", "linear", "constant", "min", "gaussian", "uniform", "blur")


@dataclass(frozen=True)
class Perturbation:
    """Removal of positions in patches.

    Args:
        patch: Length of a window of a signal, side of a square of an image; the last ones may be smaller.
        replacement: Replacement of a patch: ``"zero"``; ``"mean"``, that of the patch and channel; ``"linear"``, a line
            from the last sample before the window to the first after it (signals only; constant at an end of the
            signal); ``"constant"``, the ``value``; ``"min"``, the smallest number of the sample; ``"gaussian"``, the
            mean of the patch plus noise of standard deviation ``value`` (1 where 0); ``"uniform"``, noise between the
            sample's smallest and largest number; ``"blur"``, the sample smoothed by a Gaussian of half a patch; or a
            callable that maps inputs to their replacements, of the same shape.
        sequential: Whether ``"linear"`` reads neighbours that were already replaced, as in the code of the ECG study.
        value: See ``replacement``.
        seed: Seed of the noise, and of the order of tied patches.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its range, or ``sequential`` is used with another replacement.

    Example:
        >>> Perturbation(patch=8, replacement="zero").patch
        8
    """

    patch: int = 16
    replacement: str | Callable[[Tensor], Tensor] = "mean"
    sequential: bool = False
    value: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_bool("sequential", self.sequential)
        check_positive_int("patch", self.patch)
        check_finite_number("value", self.value)
        check_non_negative_int("seed", self.seed)
        if not callable(self.replacement):
            check_choice("replacement", self.replacement, REPLACEMENTS)
        if self.sequential and self.replacement != "linear":
            raise ValueError(
                f"`sequential` is for `replacement='linear'`, which reads the neighbours, got {self.replacement!r}"
            )


def checked_perturbation(perturbation: Perturbation | None, default: Perturbation) -> Perturbation:
    """Return the perturbation, or the default for None.

    Raises:
        TypeError: If it is none.
    """
    if perturbation is None:
        return default
    return check_instance("perturbation", perturbation, Perturbation, "a Perturbation")


class Patches:
    """Partition of the spatial positions into patches.

    Args:
        spatial: Size of each spatial dimension.
        patch: Length of a patch along each dimension.
        device: Device of the patch indices.

    Example:
        >>> Patches((2, 4), 2, torch.device("cpu")).ids
        tensor([[0, 0, 1, 1],
                [0, 0, 1, 1]])
    """

    def __init__(self, spatial: tuple[int, ...], patch: int, device: torch.device) -> None:
        self.spatial, self.patch = spatial, patch
        ids = torch.zeros(spatial, dtype=torch.long, device=device)
        self.count = 1
        for dim, size in enumerate(spatial):
            along = torch.arange(size, device=device) // patch
            blocks = math.ceil(size / patch)
            ids = ids * blocks + along.reshape([-1 if d == dim else 1 for d in range(len(spatial))])
            self.count *= blocks
        self.ids = ids

    def sums(self, maps: Tensor) -> Tensor:
        """Sum maps ``(..., *spatial)`` over each patch, shape ``(..., count)``."""
        flat = maps.flatten(maps.ndim - len(self.spatial))
        out = flat.new_zeros(*flat.shape[:-1], self.count)
        return out.index_add_(-1, self.ids.flatten(), flat)

    def means(self, maps: Tensor) -> Tensor:
        """The mean of each patch at each of its positions, with the shape of ``maps``."""
        sizes = self.ids.flatten().bincount(minlength=self.count)
        return (self.sums(maps) / sizes)[..., self.ids]


def replacements(inputs: Tensor, perturbation: Perturbation, patches: Patches, keys: Tensor) -> Tensor:
    """Return the value of each position if only its patch were replaced.

    Args:
        inputs: Tensor of shape ``(B, C, *spatial)``.
        perturbation: How to replace.
        patches: The patches of the space.
        keys: int64 tensor of shape ``(B,)``, which determines the noise.

    Returns:
        Tensor of the shape and dtype of ``inputs``.

    Raises:
        ValueError: If ``"linear"`` is used with more than one spatial dimension, or a callable changes the shape.

    Example:
        >>> signal = torch.arange(4.0).reshape(1, 1, 4)
        >>> patches = Patches((4,), 2, torch.device("cpu"))
        >>> replacements(signal, Perturbation(patch=2), patches, torch.zeros(1).long())
        tensor([[[0.5000, 0.5000, 2.5000, 2.5000]]])
    """
    rule = perturbation.replacement
    if callable(rule):
        made = rule(inputs)
        if made.shape != inputs.shape:
            raise ValueError(
                f"`replacement` must keep the shape {tuple(inputs.shape)} of its inputs, got {tuple(made.shape)}"
            )
        return made.to(inputs)
    flat = inputs.flatten(1)
    each = (-1, *[1] * (inputs.ndim - 1))
    if rule == "linear":
        return lines(inputs, patches, inputs)
    if rule in {"zero", "constant"}:
        return torch.full_like(inputs, perturbation.value if rule == "constant" else 0.0)
    if rule == "min":
        return flat.amin(1).reshape(each).expand_as(inputs)
    if rule == "blur":
        return blurred(inputs, perturbation.patch / 2)
    count = math.prod(inputs.shape[1:])
    if rule == "uniform":
        noise = random_uniform(keys, count, seed=perturbation.seed).reshape(inputs.shape).to(inputs)
        low, high = flat.amin(1).reshape(each), flat.amax(1).reshape(each)
        return low + noise * (high - low)
    means = patches.means(inputs.float() if inputs.dtype in {torch.half, torch.bfloat16} else inputs).to(inputs)
    if rule == "mean":
        return means
    noise = random_normal(keys, count, seed=perturbation.seed).reshape(inputs.shape).to(inputs)
    return means + (perturbation.value or 1.0) * noise


def lines(inputs: Tensor, patches: Patches, neighbours: Tensor) -> Tensor:
    """Replace each window by the line between its neighbours' ends, read from ``neighbours``.

    Args:
        inputs: Tensor of shape ``(B, C, L)``.
        patches: The windows.
        neighbours: Tensor of the shape of ``inputs``.

    Returns:
        Tensor of the shape of ``inputs``.

    Raises:
        ValueError: If there is more than one spatial dimension, or only one window.

    Example:
        >>> lines(torch.tensor([[[0.0, 9.0, 9.0, 3.0]]]), Patches((4,), 1, torch.device("cpu")), torch.ones(1, 1, 4))
        tensor([[[1., 1., 1., 1.]]])
    """
    if len(patches.spatial) != 1 or patches.count < 2:
        raise ValueError(
            "`replacement='linear'` draws lines between windows of a signal, got a space of size "
            f"{patches.spatial} in patches of {patches.patch}; take 'mean' or 'blur'"
        )
    length, window = patches.spatial[0], patches.patch
    at = torch.arange(length, device=inputs.device)
    before = patches.ids * window - 1
    behind = (before + window + 1).clamp_max(length)
    share = (at - before).to(inputs.dtype) / (behind - before)
    left = neighbours[..., torch.where(before >= 0, before, behind.clamp_max(length - 1))]
    right = neighbours[..., torch.where(behind < length, behind, before)]
    return torch.lerp(left, right, share)


def blurred(inputs: Tensor, sigma: float) -> Tensor:
    """Smooth along each spatial dimension with a Gaussian; boundary values are repeated.

    Args:
        inputs: Tensor of shape ``(B, C, *spatial)``.
        sigma: Standard deviation in positions.

    Returns:
        Tensor of the shape and dtype of ``inputs``.

    Example:
        >>> blurred(torch.ones(1, 1, 5), sigma=1.0).round(decimals=3)
        tensor([[[1., 1., 1., 1., 1.]]])
    """
    radius = max(1, round(3 * sigma))
    wide = inputs if inputs.dtype == torch.float64 else inputs.float()
    at = torch.arange(-radius, radius + 1, device=inputs.device, dtype=wide.dtype)
    kernel = torch.softmax(-(at**2) / (2 * sigma**2), 0)
    for dim in range(2, inputs.ndim):
        rows = wide.movedim(dim, -1)
        padded = F.pad(rows.reshape(-1, 1, rows.shape[-1]), (radius, radius), mode="replicate")
        wide = F.conv1d(padded, kernel[None, None]).reshape(rows.shape).movedim(-1, dim)
    return wide.to(inputs)
