"""A random flip, rotation and scale of a whole frame."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lightning_plugins._arguments import check_arguments
from lightning_plugins._checks import check_finite_number
from lightning_plugins.functional.boxes import rotate_z
from lightning_plugins.transforms.frame import Frame, FrameTransform


class FlipRotateScale(FrameTransform):
    """Flip a frame in y with probability one half, rotate it about z, and scale it.

    Apply it after transforms with occlusion, which need the sensor at its original position.

    Args:
        turn: Maximum angle in either direction, radians.
        scale: Smallest and largest factor.
        seed: As for `WholeBodyAugmentation`.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If an argument is of the wrong type.
    """

    def __init__(self, turn: float = math.pi / 4, scale: Sequence[float] = (0.95, 1.05), *, seed: int = 0) -> None:
        check_arguments(FlipRotateScale.__init__, locals())
        super().__init__(seed)
        if check_finite_number("turn", turn) < 0:
            raise ValueError(f"`turn` must be at least 0, got {turn!r}")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] < math.inf:
            raise ValueError(f"`scale` must be a smallest and a largest factor above 0, got {scale!r}")
        self.turn, self.scale = turn, (float(scale[0]), float(scale[1]))

    def augment(self, frame: Frame, rng: np.random.Generator) -> Frame:
        """Change a frame.

        Args:
            frame: The frame.
            rng: For the three numbers.

        Returns:
            The changed frame.
        """
        flips, angle, factor = rng.random() < 0.5, rng.uniform(-self.turn, self.turn), rng.uniform(*self.scale)
        points, boxes = frame.points.clone(), frame.boxes.clone()
        if flips:
            points[:, 1] *= -1
            boxes[:, [1, 6]] *= -1
        points, boxes = rotate_z(points, angle), rotate_z(boxes, angle)
        boxes[:, 6] = (boxes[:, 6] + angle + math.pi) % (2 * math.pi) - math.pi
        points[:, :3] *= factor
        boxes[:, :6] *= factor
        return replace(frame, points=points, boxes=boxes)
