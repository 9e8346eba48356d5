"""Maps and masks as rows of positions: channels summed, spatial dimensions flattened."""

import torch
from torch import Tensor

from lightning_plugins.functional.attribution.scoring import check_inputs
from lightning_plugins.functional.tensors import check_floating, check_real


def flat_positions(attributions: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Check that maps and masks match, and flatten both.

    Args:
        attributions: ``(B, *spatial)``, or ``(B, C, *spatial)``, whose channels are summed.
        masks: ``(B, *spatial)`` or ``(B, 1, *spatial)``; non-zero values mark true positions.

    Returns:
        The maps, at least in float32, and the masks as bools, of shape ``(B, L)`` each.

    Raises:
        TypeError: If ``attributions`` is not a floating tensor or ``masks`` no tensor.
        ValueError: If the shapes do not match, or there is no position.
    """
    maps = checked_maps(attributions)
    if not isinstance(masks, Tensor):
        raise TypeError(f"`masks` must be a tensor, got {type(masks).__name__}; `spans_to_mask` makes one of spans")
    check_real("masks", masks)
    if masks.shape != maps.shape and masks.ndim in {maps.ndim, maps.ndim + 1} and masks.shape[1:2] == (1,):
        masks = masks[:, 0] if masks.ndim > 2 else masks
    if maps.ndim == masks.ndim + 1:
        maps = maps.sum(1)
    if maps.shape != masks.shape:
        raise ValueError(
            "`masks` must have the shape (B, *spatial) of `attributions`, with or without channels, got"
            f" {tuple(masks.shape)} for attributions of shape {tuple(attributions.shape)}"
        )
    if 0 in maps.shape[1:]:
        raise ValueError(f"`attributions` must have at least one position, got shape {tuple(attributions.shape)}")
    return maps.flatten(1), masks.flatten(1).to(maps.device) != 0


def checked_maps(attributions: Tensor, name: str = "attributions") -> Tensor:
    """Return ``attributions`` detached and at least in float32.

    Raises:
        TypeError: If it is not a floating tensor.
        ValueError: If it has only the sample dimension.
    """
    check_floating(name, attributions)
    if attributions.ndim < 2:
        raise ValueError(f"`{name}` must have shape (B, [C,] *spatial), got {tuple(attributions.shape)}")
    maps = attributions.detach()
    return maps if maps.dtype in {torch.float32, torch.float64} else maps.float()


def with_channels(inputs: Tensor) -> Tensor:
    """``(B, L)`` as ``(B, 1, L)``; inputs with more dimensions already have channels."""
    check_inputs(inputs)
    return inputs.unsqueeze(1) if inputs.ndim == 2 else inputs


def maps_of_inputs(attributions: Tensor, inputs: Tensor) -> Tensor:
    """Sum the channels of maps of inputs ``(B, [C,] *spatial)``.

    Args:
        attributions: The shape of ``inputs``, with any number of channels or without that dimension.
        inputs: Inputs of the model.

    Returns:
        Maps of shape ``(B, *spatial)``.

    Raises:
        ValueError: If the shapes do not match.
    """
    maps, wide = checked_maps(attributions), with_channels(inputs)
    wanted = (wide.shape[0], *wide.shape[2:])
    if maps.ndim == wide.ndim:
        maps = maps.sum(1)
    if maps.shape != wanted:
        raise ValueError(
            f"`attributions` must have the positions of `inputs`, of shape {tuple(inputs.shape)} with or without"
            f" channels, got {tuple(attributions.shape)}"
        )
    return maps
