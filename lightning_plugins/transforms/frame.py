"""Frames of the transforms, and random numbers that depend on the sample rather than on the worker."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_plugins._checks import check_non_negative_int
from lightning_plugins.functional.boxes import points_in_boxes


@dataclass(frozen=True)
class Frame:
    """A point cloud with boxes.

    Attributes:
        points: Shape ``(n, C)``.
        boxes: Shape ``(m, 7)``, of the points' dtype.
        labels: Names of the ``m`` classes.
        source: For each point -1, or the number of the object or frame that it was taken from.
    """

    points: Tensor
    boxes: Tensor
    labels: list[str]
    source: Tensor

    @classmethod
    def read(cls, sample: Mapping[str, Any], name: str = "sample") -> "Frame":
        """Check a sample and extract its frame.

        Returns:
            The frame.

        Raises:
            TypeError: If it is not a mapping, or its labels are no names.
            ValueError: If a key is missing, a shape is wrong, or the numbers of boxes and labels differ.
        """
        if not isinstance(sample, Mapping):
            raise TypeError(
                f"`{name}`: a frame must be a dict of `points`, `boxes` and `labels`, got {type(sample).__name__}"
            )
        if missing := [key for key in ("points", "boxes", "labels") if key not in sample]:
            raise ValueError(
                f"`{name}`: a frame must have `points`, `boxes` and `labels`, got {sorted(sample)} without {missing}"
            )
        points = _tensor(sample["points"])
        if points.ndim != 2 or points.shape[1] < 3 or not points.is_floating_point():
            raise ValueError(
                "`points` must be floating with shape (n, 3 or more), "
                f"got {points.dtype} with shape {tuple(points.shape)}"
            )
        boxes = _tensor(sample["boxes"]).to(points)
        labels = [*sample["labels"]]
        if boxes.numel() == 0:
            boxes = boxes.reshape(0, 7)
        if boxes.ndim != 2 or boxes.shape[1] != 7:
            raise ValueError(f"`boxes` must have shape (m, 7) for x, y, z, dx, dy, dz, yaw, got {tuple(boxes.shape)}")
        if len(labels) != len(boxes):
            raise ValueError(f"`labels` must have one name per box, got {len(labels)} for {len(boxes)} boxes")
        for label in labels:
            if not isinstance(label, str):
                raise TypeError(f"`labels` must be names of classes, got {label!r} ({type(label).__name__})")
        source = sample.get("source")
        own = torch.full((len(points),), -1) if source is None else _tensor(source)
        return cls(points, boxes, [str(label) for label in labels], own)

    def without(self, points: Tensor, *, min_points: int) -> "Frame":
        """Remove points, and boxes left with fewer than ``min_points``."""
        if not points.any():
            return self
        gone = points_in_boxes(self.points[points], self.boxes).any(dim=0)
        kept = torch.ones(len(self.boxes), dtype=torch.bool)
        numbers = (~points).nonzero().flatten()
        left = self.points.index_select(0, numbers)  # twice as fast as a mask
        for number in gone.nonzero().flatten().tolist():
            kept[number] = int(points_in_boxes(left, self.boxes[number : number + 1]).sum()) >= min_points
        labels = [label for label, stays in zip(self.labels, kept.tolist(), strict=True) if stays]
        return replace(
            self, points=left, boxes=self.boxes[kept], labels=labels, source=self.source.index_select(0, numbers)
        )

    def write(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """The sample with this frame, as NumPy if it was NumPy; other keys are kept."""
        result = {**sample, "points": self.points, "boxes": self.boxes, "source": self.source, "labels": self.labels}
        for key in ("points", "boxes"):
            if not isinstance(sample[key], Tensor):
                result[key] = result[key].numpy()
        if not isinstance(sample["points"], Tensor):
            result["source"] = self.source.numpy()
        if isinstance(sample["labels"], np.ndarray):
            result["labels"] = np.array(self.labels)
        return result


class FrameTransform(ABC):
    """A callable on frames whose random numbers depend on ``seed``, the epoch and the sample.

    The sample is identified by its ``index``, or by its points if it has none: the same frame is augmented in the same
    way in any worker, whatever the number of workers.
    """

    def __init__(self, seed: int) -> None:
        self.seed = check_non_negative_int("seed", seed)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # so that persistent workers see changes

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which changes the random numbers; call it before iterating over the loader.

        Args:
            epoch: Its number.
        """
        self._epoch.fill_(check_non_negative_int("epoch", epoch))

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Augment a frame.

        Args:
            sample: ``points`` (n, 3 or more), ``boxes`` (m, 7) and ``labels`` (m names), NumPy or torch; optional are
                ``index`` (int) and ``source``. Other keys are kept as they are.

        Returns:
            A new dictionary with the same kinds of arrays and a ``source`` for each point: -1 for the frame's own.

        Raises:
            TypeError: If the sample is not a mapping, its labels are no names, or its points have a type that NumPy
                lacks.
            ValueError: If a key is missing, a shape or the ``index`` is wrong, or the points are on another device or
                carry gradients.
        """
        frame = Frame.read(sample)
        _check_plain(frame.points)
        return self.augment(frame, self._rng(sample, frame)).write(sample)

    @abstractmethod
    def augment(self, frame: Frame, rng: np.random.Generator) -> Frame:
        """Return the augmented frame."""

    def _rng(self, sample: Mapping[str, Any], frame: Frame) -> np.random.Generator:
        index = sample.get("index")
        if index is None:
            digest = hashlib.blake2b(frame.points.contiguous().numpy().tobytes(), digest_size=8).digest()
            return np.random.default_rng([self.seed, int(self._epoch), int.from_bytes(digest, "little"), 1])
        try:
            number = check_non_negative_int("index", int(index))
        except (TypeError, ValueError):
            raise ValueError(
                f"`index` must be a number of at least 0, got {index!r}; without it the points tell the frame"
            ) from None
        return np.random.default_rng([self.seed, int(self._epoch), number])


def _tensor(values: Any) -> Tensor:
    """The values as a tensor, copied only if they are read-only, like memory-mapped arrays."""
    if isinstance(values, np.ndarray) and not values.flags.writeable:
        values = values.copy()
    return torch.as_tensor(values)


def _check_plain(points: Tensor) -> None:
    """Raise an error for points that NumPy cannot share.

    Raises:
        TypeError: If NumPy lacks their type.
        ValueError: If they are on another device, or carry gradients.
    """
    if points.device.type != "cpu":
        raise ValueError(
            f"`points` must be on the CPU, got {points.device}; `BatchAugmentation` augments batches on any device"
        )
    if points.dtype not in (torch.float16, torch.float32, torch.float64):
        raise TypeError(f"`points` must be float16, float32 or float64, got {points.dtype}")
    if points.requires_grad:
        raise ValueError("`points` must not carry gradients, got requires_grad=True; pass `points.detach()`")


def check_area(area: Sequence[Sequence[float]]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the ranges of x and y as pairs.

    Raises:
        ValueError: If they are not two rising pairs of numbers.
    """
    try:
        (left, right), (near, far) = area
    except (TypeError, ValueError):
        raise ValueError(f"`area` must be two pairs, of x and of y, got {area!r}") from None
    if not (left < right and near < far):
        raise ValueError(f"`area` must be two rising pairs, of x and of y, got {area!r}")
    return (float(left), float(right)), (float(near), float(far))
