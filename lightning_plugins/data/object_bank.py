"""Objects cut out of frames, with candidates for completing each of them."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_plugins._arguments import check_arguments, check_index
from lightning_plugins._checks import check_finite_number, check_positive_int, nearest
from lightning_plugins.functional.boxes import part_occupancy, points_in_boxes, rotate_z

PARTS: dict[str, tuple[int, int, int]] = {"Car": (10, 4, 3), "Cyclist": (4, 2, 3), "Pedestrian": (2, 2, 3)}
_SIMILAR: dict[str, int] = {"Pedestrian": 400}  # of the other classes 800 (the paper's K1)
_WEAK = 0.8  # a part is weak below this fraction of its object's mean occupancy
_ARRAYS = ("points", "offsets", "boxes", "labels", "occupancy", "candidates")


@dataclass(frozen=True)
class BankObject:
    """One object, in the frame of its box.

    Attributes:
        points: Shape ``(n, C)``: x, y, z from the centre of the box, x along its length, and the features.
        box: The box where the object was seen, ``x, y, z, dx, dy, dz, yaw``.
        label: The name of its class.
    """

    points: np.ndarray
    box: np.ndarray
    label: str


class ObjectBank:
    """Objects cut out of frames, stored in memory-mapped arrays shared by all workers.

    `candidates` holds for each object others of its class that have points where it has few: among the most similar in
    size (3-D IoU with aligned centres and headings; 800, pedestrians 400) the half with the largest total occupancy of
    the object's weak parts, best first, at most 400. Occupancy is the number of an object's points in a part, mirror
    images included, relative to the largest number in that part of any object of the class (our reading); a part
    is weak below 0.8 times the object's mean.

    Create one with `from_frames` or `load`.

    Args:
        arrays: ``points``, ``offsets``, ``boxes``, ``labels``, ``occupancy`` and ``candidates`` as `save` writes them.
        classes: Names of the classes, in the order of the numbers in ``labels``.
        parts: Numbers of parts along x, y and z, by class.
        folder: The folder the arrays were loaded from, if any; workers open the bank there.

    Example:
        >>> from lightning_plugins.data import RaycastScenes
        >>> scenes = RaycastScenes(3, seed=0)
        >>> bank = ObjectBank.from_frames(scenes)
        >>> bank.classes, len(bank) > 10, bank[0].label
        (('Car', 'Cyclist', 'Pedestrian'), True, 'Car')

    Source:
        Shin et al., AAAI 2023, https://arxiv.org/abs/2303.12743.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        classes: Sequence[str],
        parts: Mapping[str, tuple[int, int, int]],
        folder: Path | None = None,
    ) -> None:
        check_arguments(ObjectBank.__init__, locals())
        for name, given, needed in (("arrays", arrays, _ARRAYS), ("parts", parts, classes)):
            if missing := [key for key in needed if key not in given]:
                raise ValueError(f"`{name}` must have an entry for each of {list(needed)}, got none for {missing}")
        self.arrays = {name: arrays[name] for name in _ARRAYS}
        self.classes = tuple(classes)
        self.parts = dict(zip(self.classes, _triples(parts, self.classes), strict=True))
        self.folder = folder
        labels = self.arrays["labels"]
        self._members = [np.flatnonzero(labels == number) for number in range(len(self.classes))]

    @classmethod
    def from_frames(
        cls,
        frames: Iterable[Mapping[str, Any]],
        *,
        min_points: int = 5,
        margin: float = 0.05,
        parts: Mapping[str, tuple[int, int, int]] | None = None,
    ) -> "ObjectBank":
        """Cut the objects out of frames and index them.

        Args:
            frames: Mappings with ``points`` (n, 3 or more), ``boxes`` (m, 7) and ``labels`` (m names), NumPy or torch,
                read once.
            min_points: Objects with fewer points are dropped.
            margin: Tolerance for points outside the sides and the top of a box, metres: ranges are noisy, and a tight
                box would lose half of the points on its faces.
            parts: Numbers of parts along x, y and z, by class; by default 10, 4 and 3 for ``"Car"``, 4, 2 and 3 for
                ``"Cyclist"``, 2, 2 and 3 for ``"Pedestrian"``, and as for a car for any other.

        Returns:
            The bank.

        Raises:
            ValueError: If no object has enough points, frames differ in their features, or ``margin`` is negative.
            TypeError: If ``min_points`` is not an int.
        """
        check_positive_int("min_points", min_points)
        if check_finite_number("margin", margin) < 0:
            raise ValueError(f"`margin` must be at least 0, got {margin!r}")
        clouds: list[np.ndarray] = []
        boxes: list[np.ndarray] = []
        names: list[str] = []
        for frame in frames:
            for cloud, box, name in _cut(frame, margin):
                if len(cloud) >= min_points:
                    clouds.append(cloud)
                    boxes.append(box)
                    names.append(name)
        if not clouds:
            raise ValueError(f"`frames` must have an object with at least `min_points={min_points}` points, got none")
        widths = sorted({cloud.shape[1] for cloud in clouds})
        if len(widths) > 1:
            raise ValueError(f"`frames` must have points of one number of columns, got {widths}")
        classes = sorted(set(names))
        order = sorted(range(len(names)), key=lambda number: names[number])  # stable: keeps the order of the frames
        wanted = {name: (parts or {}).get(name, PARTS.get(name, PARTS["Car"])) for name in classes}
        arrays = {
            "points": np.concatenate([clouds[number] for number in order]),
            "offsets": np.cumsum([0, *(len(clouds[number]) for number in order)]),
            "boxes": np.stack([boxes[number] for number in order]),
            "labels": np.array([classes.index(names[number]) for number in order]),
        }
        arrays["occupancy"], arrays["candidates"] = _index(arrays, classes, wanted)
        return cls(arrays, classes, wanted)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the arrays as ``.npy`` files and the names as JSON.

        Args:
            folder: Created if it does not exist.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        for name, array in self.arrays.items():
            np.save(path / f"{name}.npy", array, allow_pickle=False)
        text = json.dumps({"classes": self.classes, "parts": self.parts})
        (path / "bank.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "ObjectBank":
        """Map the arrays of a saved bank into memory, read-only.

        Args:
            folder: A folder written by `save`.

        Returns:
            The bank.

        Raises:
            FileNotFoundError: If the folder holds no bank.
        """
        path = Path(folder)
        if not (path / "bank.json").exists():
            raise FileNotFoundError(f"`folder` must hold what `ObjectBank.save` wrote, got {path} without bank.json")
        names = json.loads((path / "bank.json").read_text(encoding="utf-8"))
        arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
        return cls(arrays, names["classes"], names["parts"], path)

    def __len__(self) -> int:
        return len(self.arrays["labels"])

    def __getitem__(self, number: int) -> BankObject:
        check_index("number", number, len(self))
        start, stop = self.arrays["offsets"][number : number + 2]
        return BankObject(
            np.asarray(self.arrays["points"][start:stop]),
            np.asarray(self.arrays["boxes"][number]),
            self.classes[self.arrays["labels"][number]],
        )

    def __reduce__(self) -> tuple[Any, ...]:
        if self.folder is not None:
            return ObjectBank.load, (self.folder,)
        return ObjectBank, (self.arrays, self.classes, self.parts)

    def members(self, label: str) -> np.ndarray:
        """Return the indices of the objects of a class.

        Args:
            label: The class.

        Returns:
            Their indices, increasing.

        Raises:
            ValueError: If the bank has no such class; the message names the closest one.
        """
        if label not in self.classes:
            near = nearest(str(label), self.classes, limit=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"the bank has the classes {list(self.classes)}, got {label!r}{hint}")
        return self._members[self.classes.index(label)]

    def candidates(self, number: int, top_k: int = 400) -> np.ndarray:
        """Return the objects that complete an object, best first.

        Args:
            number: Index of the object.
            top_k: Maximum number of candidates.

        Returns:
            Their indices.
        """
        row = self.arrays["candidates"][number, :top_k]
        return np.asarray(row[row >= 0])

    def occupancy(self, number: int) -> np.ndarray:
        """Return the occupancy of an object's parts, in [0, 1], flattened."""
        count = int(np.prod(self.parts[self.classes[self.arrays["labels"][number]]]))
        return np.asarray(self.arrays["occupancy"][number, :count])


def _triples(parts: Mapping[str, tuple[int, int, int]], classes: Sequence[str]) -> Iterable[tuple[int, int, int]]:
    for name in classes:  # lists if they were read from JSON
        along, across, up = parts[name]
        yield along, across, up


def _cut(frame: Mapping[str, Any], margin: float) -> Iterable[tuple[np.ndarray, np.ndarray, str]]:
    points = torch.as_tensor(frame["points"], dtype=torch.float32)
    boxes = torch.as_tensor(frame["boxes"], dtype=torch.float32).reshape(-1, 7)
    for box, name in zip(boxes, frame["labels"], strict=True):
        wide = box + box.new_tensor(
            [0.0, 0.0, margin / 2, 2 * margin, 2 * margin, margin, 0.0]
        )  # not below, in the ground
        near = points[(points[:, :2] - box[:2]).norm(dim=1) <= wide[3:5].norm() / 2]
        inside = near[points_in_boxes(near, wide[None])[:, 0]].clone()
        inside[:, :3] -= box[:3]
        yield rotate_z(inside, -box[6]).numpy(), box.numpy(), str(name)


def _index(
    arrays: Mapping[str, np.ndarray], classes: Sequence[str], parts: Mapping[str, tuple[int, int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Occupancies and candidates of all objects, padded to those of the largest class."""
    count, offsets = len(arrays["labels"]), arrays["offsets"]
    occupancy = np.zeros((count, max(int(np.prod(parts[name])) for name in classes)), dtype=np.float32)
    candidates = np.full((count, 400), -1, dtype=np.int32)
    for number, name in enumerate(classes):
        members = np.flatnonzero(arrays["labels"] == number)
        sizes = arrays["boxes"][members, 3:6]
        for member, size in zip(members, sizes, strict=True):
            points = torch.from_numpy(arrays["points"][offsets[member] : offsets[member + 1]])
            counts = part_occupancy(points, torch.from_numpy(size), parts[name]).flatten()
            occupancy[member, : len(counts)] = counts.numpy()
        own = occupancy[members, : int(np.prod(parts[name]))]
        own = own / np.maximum(own.max(axis=0), 1)
        occupancy[members, : own.shape[1]] = own
        for row, chosen in enumerate(_complements(own, sizes, _SIMILAR.get(name, 800))):
            candidates[members[row], : len(chosen)] = members[chosen]
    width = max(1, int((candidates >= 0).sum(axis=1).max(initial=0)))
    return occupancy, candidates[:, :width]


def _complements(occupancy: np.ndarray, sizes: np.ndarray, similar: int) -> Iterable[np.ndarray]:
    """For each object of a class, others of similar size that fill its weak parts, best first."""
    volumes = sizes.prod(axis=1)
    for row, size in enumerate(sizes):
        common = np.minimum(sizes, size).prod(axis=1)
        iou = common / (volumes + volumes[row] - common)
        iou[row] = -1.0  # itself, last
        nearby = np.argsort(-iou, kind="stable")[: min(similar, len(sizes) - 1)]
        weak = occupancy[row] < _WEAK * occupancy[row].mean()
        filled = occupancy[nearby][:, weak].sum(axis=1)
        yield nearby[np.argsort(-filled, kind="stable")][: min(400, (len(nearby) + 1) // 2)]
