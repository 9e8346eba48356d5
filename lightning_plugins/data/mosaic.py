"""Mosaics of smaller images, in which the positions of the relevant class are known."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_plugins._arguments import check_arguments
from lightning_plugins._checks import check_non_negative_int, check_positive_int
from lightning_plugins.functional.tensors import check_integers


class Mosaics(NamedTuple):
    """Mosaics and the positions of their class.

    Attributes:
        images: Shape ``(n, C, rows * height, columns * width)``.
        labels: The class of each, shape ``(n,)``.
        masks: Pixels of the tiles of this class, bools of shape ``(n, rows * height, columns * width)``.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor


def mosaics(
    images: Tensor,
    labels: Tensor,
    count: int,
    *,
    classes: tuple[int, ...] | None = None,
    grid: tuple[int, int] = (2, 2),
    seed: int = 0,
) -> Mosaics:
    """Paste images into mosaics, each with one tile of its own class among tiles of irrelevant classes.

    Args:
        images: Shape ``(N, C, height, width)``.
        labels: Class of each, integers of shape ``(N,)``.
        count: Number of mosaics.
        classes: The relevant classes, renumbered 0, 1, … in this order; the others fill the rest. By default the first
            half of those that occur.
        grid: Tiles in a column and in a row.
        seed: Seed for choosing tiles and positions.

    Returns:
        The mosaics, their classes equally frequent.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If shapes differ, or there is no relevant or no irrelevant class.

    Example:
        >>> made = mosaics(torch.rand(40, 1, 8, 8), torch.arange(40) % 10, 6, classes=(0, 1))
        >>> made.images.shape, made.labels.tolist(), made.masks.sum((1, 2)).tolist()
        (torch.Size([6, 1, 16, 16]), [0, 1, 0, 1, 0, 1], [64, 64, 64, 64, 64, 64])

    Source:
        Arias-Duart et al., "Focus! Rating XAI methods and finding biases", FUZZ-IEEE 2022.
    """
    check_arguments(mosaics, locals())
    check_positive_int("count", count)
    rows, columns = (check_positive_int("grid", size) for size in grid)
    check_integers("labels", labels)
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"`images` must have shape (N, C, height, width) and `labels` (N,), got {tuple(images.shape)} and"
            f" {tuple(labels.shape)}"
        )
    known = sorted(set(labels.tolist()))
    wanted = tuple(known[: len(known) // 2]) if classes is None else tuple(classes)
    fill = torch.isin(labels, torch.tensor(wanted, dtype=labels.dtype), invert=True).nonzero()[:, 0]
    if not wanted or not set(wanted) <= set(known) or not len(fill):
        raise ValueError(f"`classes` must be some of {known} and leave others to fill the mosaics, got {wanted}")
    draw = torch.Generator().manual_seed(check_non_negative_int("seed", seed))
    height, width = images.shape[2:]
    result = images.new_empty(count, images.shape[1], rows * height, columns * width)
    masks = torch.zeros(count, rows * height, columns * width, dtype=torch.bool)
    for number in range(count):
        own = (labels == wanted[number % len(wanted)]).nonzero()[:, 0]
        place = int(torch.randint(rows * columns, (), generator=draw))
        for tile in range(rows * columns):
            pool = own if tile == place else fill
            pick = pool[int(torch.randint(len(pool), (), generator=draw))]
            top, left = tile // columns * height, tile % columns * width
            result[number, :, top : top + height, left : left + width] = images[pick]
            masks[number, top : top + height, left : left + width] = tile == place
    return Mosaics(result, torch.arange(count) % len(wanted), masks)
