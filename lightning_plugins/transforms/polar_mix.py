"""PolarMix: swaps sectors between scans and pastes rotated objects."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lightning_plugins._arguments import check_arguments
from lightning_plugins._checks import check_fraction
from lightning_plugins.functional.boxes import points_in_boxes, rotate_z
from lightning_plugins.transforms.frame import Frame, FrameTransform


class PolarMix(FrameTransform):
    """Exchange half of the azimuth range with another frame, or paste its objects rotated about the sensor.

    Points are exchanged together with the boxes whose centres are in the sector. Objects of the other frame are pasted
    three times, rotated by random angles in the three thirds of a circle. There is no occlusion, and objects may
    overlap, as in the published method.

    Args:
        frames: The other frames, such as the data set.
        swap: Probability of exchanging sectors.
        paste: Probability of pasting objects.
        seed: As for `WholeBodyAugmentation`.

    Raises:
        ValueError: If there is no other frame, or a probability is out of range.
        TypeError: If an argument is of the wrong type.

    Source:
        Xiao et al., PolarMix, NeurIPS 2022, https://arxiv.org/abs/2208.00223.
    """

    def __init__(
        self, frames: Sequence[Mapping[str, Any]], *, swap: float = 0.5, paste: float = 1.0, seed: int = 0
    ) -> None:
        check_arguments(PolarMix.__init__, locals())
        super().__init__(seed)
        if not hasattr(frames, "__getitem__") or not hasattr(frames, "__len__"):
            raise TypeError(f"`frames` must have `__len__` and `__getitem__`, got {type(frames).__name__}")
        if len(frames) == 0:
            raise ValueError("`frames` must have at least one frame to mix in, got none")
        self.frames = frames
        self.swap, self.paste = check_fraction("swap", swap), check_fraction("paste", paste)

    def augment(self, frame: Frame, rng: np.random.Generator) -> Frame:
        """Mix another frame into a frame.

        Args:
            frame: The frame.
            rng: For choosing the other frame, the sector and the angles.

        Returns:
            The mixed frame.
        """
        number = int(rng.integers(len(self.frames)))
        other = Frame.read(self.frames[number])
        other = Frame(other.points.to(frame.points), other.boxes.to(frame.boxes), other.labels, other.source)
        start, swaps, pastes = rng.uniform(-math.pi, math.pi), rng.random() < self.swap, rng.random() < self.paste
        angles = rng.uniform(0, 2 * math.pi / 3, 3) + np.arange(3) * 2 * math.pi / 3
        pieces = [_sector(frame, start, inside=False), _sector(other, start, inside=True)] if swaps else [frame]
        if pastes and len(other.boxes):
            inside = points_in_boxes(other.points, other.boxes).any(dim=1)
            for angle in angles.tolist():
                boxes = rotate_z(other.boxes, angle)
                boxes[:, 6] = (boxes[:, 6] + angle + math.pi) % (2 * math.pi) - math.pi
                points = rotate_z(other.points[inside], angle)
                pieces.append(Frame(points, boxes, other.labels, other.source[inside]))
        for place, piece in enumerate(pieces[1:], start=1):
            source = torch.full_like(piece.source, number)
            pieces[place] = Frame(piece.points, piece.boxes, piece.labels, source)
        return Frame(
            torch.cat([piece.points for piece in pieces]),
            torch.cat([piece.boxes for piece in pieces]),
            [label for piece in pieces for label in piece.labels],
            torch.cat([piece.source for piece in pieces]),
        )


def _sector(frame: Frame, start: float, *, inside: bool) -> Frame:
    """Return the points within half a turn from an azimuth, or those outside it."""

    def chosen(places: torch.Tensor) -> torch.Tensor:
        turn = (torch.atan2(places[:, 1], places[:, 0]) - start) % (2 * math.pi)
        return (turn < math.pi) == inside

    points, boxes = chosen(frame.points), chosen(frame.boxes)
    labels = [label for label, stays in zip(frame.labels, boxes.tolist(), strict=True) if stays]
    return Frame(frame.points[points], frame.boxes[boxes], labels, frame.source[points])
