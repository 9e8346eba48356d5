"""Select the rows of a batch that count: a mask leaves padded tokens out."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_plugins._checks import nearest

Mask = str | Callable[[Any], Tensor]


def check_mask(mask: Mask | None) -> Mask | None:
    """Return ``mask`` if it is the name of an entry, a function or None.

    Args:
        mask: The argument's value.

    Returns:
        ``mask``, unchanged.

    Raises:
        TypeError: If it is something else.
        ValueError: If it is an empty name.

    Example:
        >>> check_mask("attention_mask")
        'attention_mask'
    """
    if mask is not None and not isinstance(mask, str) and not callable(mask):
        hint = "; for one tensor that fits all batches pass a function that returns it" * isinstance(mask, Tensor)
        raise TypeError(
            "`mask` must be the name of a batch's entry, a function of a batch, or None, got "
            f"{type(mask).__name__}{hint}"
        )
    if mask == "":
        raise ValueError("`mask` must be the name of a batch's entry, such as 'attention_mask', got an empty one")
    return mask


def mask_of(batch: Any, mask: Mask | None) -> Tensor | None:
    """The mask of a batch.

    Args:
        batch: The batch.
        mask: The name of its entry, a function that returns it, or None for no mask.

    Returns:
        A tensor that is not 0 where a row counts, or None.

    Raises:
        TypeError: If a function returns no tensor of numbers, or a name is given and batches have no names.
        ValueError: If the batch has no such entry, or the mask is not finite.

    Example:
        >>> mask_of({"attention_mask": torch.tensor([[1, 0]])}, "attention_mask")
        tensor([[ True, False]])
    """
    if mask is None:
        return None
    if isinstance(mask, str):
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"`mask={mask!r}` must name an entry of the batches, but they are of type {type(batch).__name__}; "
                "pass a function that takes a batch and returns its mask"
            )
        if mask not in batch:
            near = "".join(f"; did you mean {other!r}?" for other in nearest(mask, list(batch), limit=1))
            raise ValueError(f"`mask` must be one of a batch's entries {list(batch)}, got {mask!r}{near}")
        found = batch[mask]
    else:
        found = mask(batch)
    if not isinstance(found, Tensor) or found.is_complex():
        raise TypeError(f"`mask` must give a tensor that is 0 where a row does not count, got {type(found).__name__}")
    if found.is_floating_point() and not bool(found.isfinite().all()):
        hint = "; a mask of 0 and -inf is one to add to attention scores: pass the tokenizer's"
        raise ValueError(f"`mask` must be 0 where a row does not count and 1 elsewhere, got NaN or infinity{hint}")
    return found != 0


class RowIndex:
    """The rows that count, and a sample of them, for the layers of one batch.

    Args:
        mask: True where a row counts, or None.
        generator: Draws the samples.
    """

    def __init__(self, mask: Tensor | None, generator: torch.Generator) -> None:
        self._mask, self._generator = mask, generator
        self._found: dict[tuple[int, ...], Tensor | None] = {}
        self._orders: dict[int, Tensor] = {}

    def rows(self, name: str, places: tuple[int, ...], device: torch.device) -> Tensor | None:
        """The rows of a layer that count.

        Args:
            name: The layer's name, for the message.
            places: The shape over which its rows lie.
            device: Where the index is wanted.

        Returns:
            An index over the flattened places; None for all of them.

        Raises:
            ValueError: If the mask has another shape.
        """
        if places not in self._found:
            self._found[places] = self._fitting(name, places)
        found = self._found[places]
        return None if found is None else found.to(device)

    def sample(self, count: int, fraction: float) -> Tensor | None:
        """Draw some of ``count`` rows, without replacement; the same ones for every layer with as many.

        Args:
            count: The number of rows.
            fraction: What part of them, in (0, 1]; rounded up.

        Returns:
            An index on the CPU; None for all of them.
        """
        wanted = min(count, int(fraction * count) + 1)
        if wanted == count:
            return None
        if count not in self._orders:
            self._orders[count] = torch.randperm(count, generator=self._generator)
        return self._orders[count][:wanted]

    def _fitting(self, name: str, places: tuple[int, ...]) -> Tensor | None:
        mask = self._mask
        if mask is None:
            return None
        shape = tuple(mask.shape)
        if places in {shape, (mask.numel(),)}:
            return mask.flatten().nonzero()[:, 0]
        if mask.ndim == 1 and places and places[0] == len(mask):  # of whole samples
            return mask.reshape(-1, *(1 for _ in places[1:])).expand(places).flatten().nonzero()[:, 0]
        if mask.ndim > 1 and places == shape[:1]:  # one row per sample: pooled rows have no padding
            return None
        raise ValueError(
            f"`mask` must have the shape {places} of the rows that {name!r} receives, or {places[:1]} for whole "
            f"samples, got {shape}; calibrate layers that see other sequences separately, with their own mask"
        )
