"""Generated street frames: labelled objects among scenery, scanned by a simulated sensor."""

from typing import Any

import numpy as np
import torch

from lightning_plugins._arguments import check_arguments, check_index
from lightning_plugins._checks import check_non_negative_int, check_positive_int
from lightning_plugins.data.raycast import Scan, Shape, SpinningSensor, prism, scan
from lightning_plugins.functional.boxes import bev_overlap

_SIZES = {"Car": (4.2, 1.8, 1.55), "Cyclist": (1.8, 0.6, 1.7), "Pedestrian": (0.7, 0.7, 1.75)}
_CAR = prism([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.05), (0.2, 0.5), (-0.35, 0.5), (-0.5, 0.1)])


class RaycastScenes(torch.utils.data.Dataset[dict[str, Any]]):
    """Frames of generated scenes: cars (meshes), cyclists (boxes), pedestrians (cylinders), walls and poles on a plane.

    Every frame depends only on ``seed`` and its index. It is a dictionary of ``points`` (n, 4) float32, ``boxes`` (m,
    7) float32, ``labels`` (m names) and ``index``. Boxes with fewer than five points are dropped.

    Args:
        num_frames: Number of frames.
        sensor: The sensor; by default 32 beams of 1,024 azimuths.
        seed: Of the scenes.
        objects: Objects per class and frame; by default 6 cars, 2 cyclists and 3 pedestrians.
        scenery: Walls and poles per frame.

    Raises:
        ValueError: If a number is out of range, or a class unknown.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> frame = RaycastScenes(1)[0]
        >>> frame["points"].shape[1], frame["boxes"].shape[1]
        (4, 7)
    """

    def __init__(
        self,
        num_frames: int,
        sensor: SpinningSensor | None = None,
        *,
        seed: int = 0,
        objects: dict[str, int] | None = None,
        scenery: int = 12,
    ) -> None:
        check_arguments(RaycastScenes.__init__, locals())
        self.num_frames = check_positive_int("num_frames", num_frames)
        self.sensor = sensor or SpinningSensor()
        self.seed = check_non_negative_int("seed", seed)
        self.scenery = check_non_negative_int("scenery", scenery)
        self.objects = {"Car": 6, "Cyclist": 2, "Pedestrian": 3} if objects is None else dict(objects)
        for name, count in self.objects.items():
            if name not in _SIZES:
                raise ValueError(f"`objects` must count classes out of {list(_SIZES)}, got {name!r}")
            check_non_negative_int(f"objects[{name!r}]", count)

    def __len__(self) -> int:
        return self.num_frames

    def __getitem__(self, index: int) -> dict[str, Any]:
        check_index("index", index, self.num_frames)
        shapes = self.shapes(index)
        return frame_of(shapes, scan(shapes, self.sensor, self._rng(index, 1)), index)

    def shapes(self, index: int) -> list[Shape]:
        """Return the shapes of a scene.

        Args:
            index: Number of the frame.

        Returns:
            The shapes, without overlaps in bird's-eye view.
        """
        rng = self._rng(index, 0)
        made: list[Shape] = []
        for name, count in self.objects.items():
            for _ in range(count):
                self._add(made, rng, name)
        for number in range(self.scenery):
            self._add(made, rng, "wall" if number % 2 else "pole")
        return made

    def _add(self, made: list[Shape], rng: np.random.Generator, name: str) -> None:
        for _ in range(20):
            shape = self._draw(rng, name)
            taken = torch.tensor([[0.0, 0, 0, 4, 2, 2, 0], *(other.box for other in made)])  # the place of the sensor
            if not bev_overlap(torch.tensor([shape.box]), taken).any():
                made.append(shape)
                return

    def _draw(self, rng: np.random.Generator, name: str) -> Shape:
        far = 30.0 if name == "Pedestrian" else 55.0
        x, y, yaw = rng.uniform(-far, far), rng.uniform(-min(far, 35.0), min(far, 35.0)), rng.uniform(-np.pi, np.pi)
        if name == "pole":
            size, yaw = np.array([0.25, 0.25, rng.uniform(3, 6)]), 0.0
        elif name == "wall":
            size = np.array([rng.uniform(4, 12), 0.4, rng.uniform(1, 4)])
        else:
            size = np.array(_SIZES[name]) * rng.uniform(0.92, 1.08, 3)
        if name == "Pedestrian":
            size[1] = size[0]
        box = (x, y, size[2] / 2 - self.sensor.height, *size, yaw)
        kind = {"Car": "mesh", "Pedestrian": "cylinder", "pole": "cylinder"}.get(name, "box")
        return Shape(
            tuple(float(value) for value in box),  # type: ignore[arg-type]  # seven of them
            kind,
            name if name in _SIZES else None,
            _CAR if name == "Car" else None,
            float(rng.uniform(0.1, 0.9)),
        )

    def _rng(self, index: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, index, stream])


def frame_of(shapes: list[Shape], found: Scan, index: int = 0, *, min_points: int = 5) -> dict[str, Any]:
    """Convert a scan to a frame.

    Args:
        shapes: The shapes.
        found: Their scan.
        index: Index of the frame.
        min_points: Objects with fewer points get no box.

    Returns:
        ``points``, ``boxes``, ``labels`` and ``index``.
    """
    check_arguments(frame_of, locals())
    counts = np.bincount(found.hit[found.hit >= 0], minlength=len(shapes))
    seen = [shape for shape, count in zip(shapes, counts, strict=True) if shape.label and count >= min_points]
    boxes = np.array([shape.box for shape in seen], dtype=np.float32).reshape(-1, 7)
    return {"points": found.points, "boxes": boxes, "labels": [shape.label for shape in seen], "index": index}
