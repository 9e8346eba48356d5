"""The rows that a layer multiplies its weight with: tokens of a linear layer, patches of a convolution."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins.compression.low_rank.splittable import Layer
from lightning_plugins.compression.low_rank.transposed import as_linear

_AT_ONCE = 1 << 21  # numbers in the patches that are cut out at once: a convolution's are k * k times its input


class Rows(NamedTuple):
    """Where the rows are in one input of a layer.

    Attributes:
        layer: The layer.
        given: Its input; of a convolution with its batch dimension and padded.
        places: The shape over which rows lie: the leading dimensions, or samples and places of the output.
    """

    layer: Layer
    given: Tensor
    places: tuple[int, ...]


def width(layer: Layer) -> int:
    """The number of entries of a row.

    Args:
        layer: A linear layer or convolution.

    Returns:
        The inputs of a linear layer, or the entries of a convolution's patch.

    Example:
        >>> width(nn.Conv2d(3, 8, 5))
        75
    """
    size: int = as_linear(layer).weight[0].numel()
    return size


def rows_of(layer: Layer, given: Tensor) -> Rows:
    """Find the rows of a layer's input.

    Args:
        layer: A linear layer or convolution.
        given: Its input.

    Returns:
        Where they are.

    Example:
        >>> rows_of(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(2, 3, 5, 5)).places
        (2, 5, 5)
    """
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return Rows(layer, given, tuple(given.shape[:-1]))
    dimensions = len(layer.kernel_size)
    given = given if given.ndim == dimensions + 2 else given[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    given = F.pad(given, layer._reversed_padding_repeated_twice, mode=mode)
    sizes = zip(given.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True)
    places = [(size - gap * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, gap in sizes]
    return Rows(layer, given, (len(given), *places))


def take(rows: Rows, index: Tensor | None) -> Iterator[Tensor]:
    """Cut rows out, some at a time.

    Args:
        rows: Where they are.
        index: Which of them, counted over ``rows.places``; None for all.

    Yields:
        Matrices with the width of a row, in the dtype of the input.
    """
    if not isinstance(rows.layer, nn.Conv1d | nn.Conv2d):
        flat = rows.given.reshape(-1, rows.given.shape[-1])
        yield flat if index is None else flat[index]
        return
    count = torch.Size(rows.places).numel()
    index = torch.arange(count, device=rows.given.device) if index is None else index
    for part in index.split(max(1, _AT_ONCE // width(rows.layer))):
        yield _patches(rows, rows.layer, part)


def _patches(rows: Rows, layer: nn.Conv1d | nn.Conv2d, index: Tensor) -> Tensor:
    """The patches of a convolution at places of its output, in the order of its kernel."""
    sample, *places = torch.unravel_index(index, rows.places)
    at = []
    for number, place in enumerate(places):
        steps = torch.arange(layer.kernel_size[number], device=index.device) * layer.dilation[number]
        shape = [len(index), *(-1 if other == number else 1 for other in range(len(places)))]
        at.append((place[:, None] * layer.stride[number] + steps).reshape(shape))
    sample = sample.reshape(-1, *(1 for _ in places))
    where: Any = (sample, slice(None), *at)
    found = rows.given[where]  # rows, places of the kernel, channels
    return found.movedim(-1, 1).flatten(1)
