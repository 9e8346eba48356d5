"""Checks of the matrices passed to metrics."""

import torch
from torch import Tensor

from lightning_plugins.functional.tensors import check_floating, check_real


def check_embeddings(name: str, embeddings: Tensor, num_features: int | None = None) -> Tensor:
    """Return ``embeddings`` if it is a floating tensor of shape ``(N, num_features)``.

    Args:
        name: The argument's name, for the message.
        embeddings: The argument's value; no row at all is allowed.
        num_features: The required number of columns; None for any.

    Returns:
        ``embeddings``, unchanged.

    Raises:
        TypeError: If it is not a floating tensor.
        ValueError: If it has another shape.
    """
    if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
        kind = str(embeddings.dtype) if isinstance(embeddings, Tensor) else type(embeddings).__name__
        raise TypeError(f"`{name}` must be a floating tensor, got {kind}; convert it with `.float()`")
    check_floating(name, embeddings)
    wanted = "d" if num_features is None else str(num_features)
    if embeddings.ndim != 2 or (num_features is not None and embeddings.shape[1] != num_features):
        hint = "; pool or flatten it to one row per sample" if embeddings.ndim > 2 else ""
        raise ValueError(f"`{name}` must have shape (N, {wanted}), got {tuple(embeddings.shape)}{hint}")
    return embeddings


def valid_rows(name: str, embeddings: Tensor, num_features: int | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows of embeddings, zero where masked out, and their number.

    Does not synchronise the device.

    Args:
        name: The argument's name, for the message.
        embeddings: Floating tensor of shape ``(N, num_features)``, or with a mask ``(..., num_features)``.
        num_features: The required number of columns; None for any.
        mask: None, or a bool or integer tensor of the shape of ``embeddings`` without its last dimension, true where a
            row counts.

    Returns:
        Tensor of shape ``(rows, num_features)``, and a number, or an integer scalar on the device.

    Raises:
        TypeError: If ``embeddings`` is not a floating tensor, or ``mask`` neither bool nor integer.
        ValueError: If the shapes do not fit.
    """
    if mask is None:
        check_embeddings(name, embeddings, num_features)
        return embeddings.detach(), torch.full((), len(embeddings), device=embeddings.device)  # a copy would wait
    valid = check_mask(name, embeddings, mask)
    rows = check_embeddings(name, embeddings.detach().flatten(end_dim=-2), num_features)
    return torch.where(valid[:, None], rows, 0), valid.sum()


def check_mask(name: str, embeddings: Tensor, mask: Tensor) -> Tensor:
    """Return a mask as one bool per row of ``embeddings``.

    Raises:
        TypeError: If one of them is not a tensor, or the mask neither bool nor integer.
        ValueError: If the mask does not have the shape of the rows.
    """
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
        kind = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"`mask` must be a bool or integer tensor, true where a row counts, got {kind}")
    check_real("mask", mask)
    check_floating(name, embeddings)
    if embeddings.ndim < 2 or mask.shape != embeddings.shape[:-1]:
        raise ValueError(
            f"`mask` must have the shape of `{name}` without its last dimension, {tuple(embeddings.shape[:-1])}, got "
            f"{tuple(mask.shape)}"
        )
    return (mask != 0).flatten()
