"""Masks from spans of a signal or boxes of an image."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_plugins._checks import check_positive_int, shown
from lightning_plugins.functional.tensors import check_dims, check_integers


def beat_spans(r_peaks: Tensor, labels: Tensor, length: int) -> dict[int, Tensor]:
    """Bound each beat of a signal by the midpoints between its R peak and the neighbours'.

    Args:
        r_peaks: Increasing sample indices of shape ``(n,)``, within the signal.
        labels: Integers of shape ``(n,)``: the class of each beat.
        length: Number of samples of the signal.

    Returns:
        For each label that occurs, in increasing order, the spans of its beats, an integer tensor of shape ``(m, 2)``:
        the first sample, and one beyond the last. The first span begins at 0 and the last ends at ``length``.

    Raises:
        TypeError: If a tensor is not of integers or ``length`` no int.
        ValueError: If the shapes differ, or the peaks do not increase or lie outside the signal.

    Example:
        >>> beat_spans(torch.tensor([10, 31, 50]), torch.tensor([0, 1, 0]), length=60)
        {0: tensor([[ 0, 20],
                [40, 60]]), 1: tensor([[20, 40]])}

    Source:
        Suh et al., arXiv 2211.12702, whose code uses integer midpoints.
    """
    check_positive_int("length", length)
    for name, value in (("r_peaks", r_peaks), ("labels", labels)):
        check_integers(name, value, "a tensor of integers")
        if value.ndim != 1 or value.shape != r_peaks.shape:
            check_dims(name, r_peaks, 1, "(n,)")
            raise ValueError(
                f"`{name}` must have shape (n,), one number a beat, got {tuple(value.shape)} for {len(r_peaks)} R peaks"
            )
    if len(r_peaks) and (int(r_peaks.min()) < 0 or int(r_peaks.max()) >= length):
        raise ValueError(
            f"`r_peaks` must lie within the signal, 0 to {length - 1}, got {int(r_peaks.min())} to {int(r_peaks.max())}"
        )
    if bool((r_peaks.diff() <= 0).any()):
        raise ValueError("`r_peaks` must rise; sort them, with their labels, and drop doubles")
    middles = (r_peaks[:-1] + r_peaks[1:]) // 2
    bounds = torch.cat([r_peaks.new_zeros(1), middles, r_peaks.new_full((1,), length)])
    spans = torch.stack([bounds[:-1], bounds[1:]], 1)[: len(r_peaks)]
    return {int(label): spans[labels == label] for label in labels.unique(sorted=True)}


def spans_to_mask(spans: Tensor | Sequence[Sequence[int]], length: int) -> Tensor:
    """Mark the samples of spans.

    Args:
        spans: Integers of shape ``(m, 2)``: first sample, one beyond the last; they may overlap. None marks nothing.
        length: Number of samples of the signal.

    Returns:
        Bool tensor of shape ``(length,)``.

    Raises:
        TypeError: If ``length`` is not an int, or a bound none.
        ValueError: If a span is empty, lies outside the signal, or does not have two bounds.

    Example:
        >>> spans_to_mask([(0, 2), (3, 4)], length=5)
        tensor([ True,  True, False,  True, False])
    """
    return _mask("spans", spans, (length,))


def boxes_to_mask(boxes: Tensor | Sequence[Sequence[int]], shape: Sequence[int]) -> Tensor:
    """Mark the positions of boxes.

    Args:
        boxes: Integers of shape ``(m, 2 * len(shape))``: the first position along each dimension, then, along each, one
            beyond the last; for an image ``(top, left, bottom, right)``.
        shape: Spatial size, such as ``(length,)`` or ``(height, width)``.

    Returns:
        Bool tensor of the given shape.

    Raises:
        TypeError: If a size is not an int, or a bound none.
        ValueError: If a box is empty, lies outside, or has another number of bounds.

    Example:
        >>> boxes_to_mask([(0, 1, 2, 3)], (2, 4)).int()
        tensor([[0, 1, 1, 0],
                [0, 1, 1, 0]], dtype=torch.int32)
    """
    return _mask("boxes", boxes, shape)


def _mask(name: str, boxes: Tensor | Sequence[Sequence[int]], shape: Sequence[int]) -> Tensor:
    if not isinstance(shape, Sequence) or isinstance(shape, str | bytes) or not shape:
        raise TypeError(f"`shape` must be the sizes of the space, got {shown(shape)}")
    what = "length" if name == "spans" else "shape"
    for size in shape:
        check_positive_int(what, size)
    table = _table(name, boxes)
    if math.prod(shape) > 2**40:
        raise ValueError(f"`{what}` must be a space that fits into memory, got {shown(shape)}")
    if table.numel() == 0:
        return torch.zeros(*shape, dtype=torch.bool)
    if table.ndim != 2 or table.shape[1] != 2 * len(shape):
        raise ValueError(f"`{name}` must have shape (m, {2 * len(shape)}), got {tuple(table.shape)}")
    mask = torch.zeros(*shape, dtype=torch.bool)
    for box in table.tolist():
        begins, ends = box[: len(shape)], box[len(shape) :]
        if any(not 0 <= begin < end <= size for begin, end, size in zip(begins, ends, shape, strict=True)):
            raise ValueError(
                f"`{name}` must have 0 <= first < one beyond the last <= {tuple(shape)}, got {begins} to {ends}"
            )
        mask[tuple(slice(begin, end) for begin, end in zip(begins, ends, strict=True))] = True
    return mask


def _table(name: str, boxes: Tensor | Sequence[Sequence[int]]) -> Tensor:
    if not isinstance(boxes, Tensor):
        if not isinstance(boxes, Sequence) or isinstance(boxes, str | bytes):
            raise TypeError(f"`{name}` must be a table of integers, got {shown(boxes)}")
        try:
            boxes = torch.tensor(boxes)
        except (TypeError, ValueError, RuntimeError):  # rows of several lengths, or no numbers
            raise TypeError(f"`{name}` must be a table of integers, got {shown(boxes)}") from None
    if boxes.numel() == 0:
        return boxes
    check_integers(name, boxes, "of integers")
    return boxes
