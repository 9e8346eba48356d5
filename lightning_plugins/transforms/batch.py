"""Whole-body augmentation of padded batches, on any device and without synchronising it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_plugins._arguments import check_arguments
from lightning_plugins._checks import check_fraction, check_instance, check_int, check_positive_int
from lightning_plugins.data.object_bank import ObjectBank
from lightning_plugins.functional.boxes import bev_overlap, points_in_boxes, rotate_z
from lightning_plugins.functional.ground import ground_height
from lightning_plugins.functional.range_image import RangeGrid, close_gaps, nearest_ranges
from lightning_plugins.transforms.frame import Frame, check_area
from lightning_plugins.transforms.occlusion import TOLERANCE
from lightning_plugins.transforms.random_bits import sample_keys, uniform
from lightning_plugins.transforms.whole_body import GRID, MIN_POINTS, WholeBodyAugmentation

KEYS = ("points", "mask", "boxes", "labels")
_TRIES = 8


def collate_frames(frames: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> dict[str, Tensor]:
    """Pad frames to one batch.

    Args:
        frames: Dictionaries of ``points``, ``boxes`` and ``labels``, and ``index`` if all have one.
        classes: Names of the classes; a label becomes its index in them. Boxes of other classes are dropped.

    Returns:
        ``points`` (B, N, C), ``mask`` (B, N) true for points, ``boxes`` (B, M, 7), ``labels`` (B, M), -1 for padding,
        and ``index`` (B,).

    Raises:
        ValueError: If there is no frame.

    Example:
        >>> frame = {"points": torch.zeros(3, 4), "boxes": torch.ones(1, 7), "labels": ["Car"]}
        >>> {name: tuple(value.shape) for name, value in collate_frames([frame, frame], ["Car"]).items()}
        {'points': (2, 3, 4), 'mask': (2, 3), 'boxes': (2, 1, 7), 'labels': (2, 1)}
    """
    check_arguments(collate_frames, locals())
    if not frames:
        raise ValueError("`frames` must have at least one frame, got none")
    read = [Frame.read(frame, "frames") for frame in frames]
    known = [[number for number, label in enumerate(frame.labels) if label in classes] for frame in read]
    numbers = [
        torch.tensor([classes.index(f.labels[i]) for i in own]).long() for f, own in zip(read, known, strict=True)
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {
        "points": pad([frame.points for frame in read], batch_first=True),
        "mask": pad([torch.ones(len(frame.points), dtype=torch.bool) for frame in read], batch_first=True),
        "boxes": pad([frame.boxes[own] for frame, own in zip(read, known, strict=True)], batch_first=True),
        "labels": pad(numbers, batch_first=True, padding_value=-1),
    }
    if all("index" in frame for frame in frames):
        batch["index"] = torch.tensor([int(frame["index"]) for frame in frames])
    return batch


class BatchAugmentation:
    """Insert whole objects into padded batches with range images.

    As `WholeBodyAugmentation` with its range image, with these differences: objects are completed once, at
    construction, and thinned at random to ``max_points``; eight places are tried; of an object's points the nearest on
    each beam is kept without moving it onto the beam; gaps of all objects are closed together, up to one beam high and
    two wide. Random numbers are generated on the device from the seed, the step and the sample's ``index`` (or its
    points), so that they are the same in any batch and on any process.

    Args:
        bank: The objects.
        targets: How many objects of each class a frame is filled up to.
        grid: The sensor's cells; by default about those of 64 beams and 2,048 azimuths.
        area: Ranges of x and of y for new places, metres.
        pool_size: Maximum number of completed objects per class.
        max_points: Maximum number of points of an object.
        seed: Seed of all random numbers.

    Raises:
        ValueError: If an argument is out of range, or a class is not in the bank.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> from lightning_plugins.data import RaycastScenes
        >>> scenes = RaycastScenes(3)
        >>> bank = ObjectBank.from_frames(scenes)
        >>> augment = BatchAugmentation(bank, {"Car": 8}, grid=scenes.sensor.grid)
        >>> batch = collate_frames([scenes[0], scenes[1]], bank.classes)
        >>> augment(batch)["boxes"].shape[1] - batch["boxes"].shape[1]
        8
    """

    def __init__(
        self,
        bank: ObjectBank,
        targets: Mapping[str, int],
        *,
        grid: RangeGrid | None = None,
        area: Sequence[Sequence[float]] = ((5.0, 65.0), (-35.0, 35.0)),
        pool_size: int = 256,
        max_points: int = 1024,
        seed: int = 0,
    ) -> None:
        maker = WholeBodyAugmentation(bank, targets, grid=grid, area=area, seed=seed)
        self.targets, self.seed, self.grid = maker.targets, maker.seed, grid or GRID
        self.area = check_area(area)
        self.classes = bank.classes
        self.max_points = check_positive_int("max_points", max_points)
        check_positive_int("pool_size", pool_size)
        self._pools = {label: self._pool(maker, label, pool_size) for label in targets}

    def _pool(self, maker: WholeBodyAugmentation, label: str, size: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, self.classes.index(label)])
        members = maker.bank.members(label)
        clouds, boxes, numbers = [], [], []
        for number in rng.permutation(members)[:size].tolist():
            body = maker.construct(number, rng)
            chosen = torch.from_numpy(rng.permutation(len(body.points))[: self.max_points])
            clouds.append(body.points[chosen])
            boxes.append(body.box)
            numbers.append(number)
        return {
            "points": torch.nn.utils.rnn.pad_sequence(clouds, batch_first=True),
            "counts": torch.tensor([len(cloud) for cloud in clouds]),
            "boxes": torch.stack(boxes),
            "numbers": torch.tensor(numbers),
        }

    def __call__(self, batch: Mapping[str, Tensor], *, share: float = 1.0, step: int = 0) -> dict[str, Tensor]:
        """Augment a batch.

        Args:
            batch: As returned by `collate_frames`, with labels in the order of the bank's classes.
            share: Fraction of the targets, in [0, 1].
            step: Step, which changes the random numbers.

        Returns:
            A new dictionary with longer ``points``, ``mask``, ``boxes`` and ``labels``, and ``source`` (B, N): the
            number of an inserted point's object, -1 elsewhere.

        Raises:
            ValueError: If a key is missing, the columns differ from the bank's, or ``share`` is out of range.
        """
        check_fraction("share", share)
        check_instance("batch", batch, Mapping, "a dict of tensors, as `collate_frames` makes it")
        step = check_int("step", step)
        if missing := [key for key in KEYS if key not in batch]:
            raise ValueError(f"`batch` must have {list(KEYS)}, got {sorted(map(str, batch))} without {missing}")
        slots = [(label, n) for label, count in self.targets.items() for n in range(round(share * count))]
        points, mask = batch["points"], batch["mask"]
        result = dict(batch)
        result["source"] = torch.full_like(mask, -1, dtype=torch.int64)
        if not slots:
            return result
        chosen = self._choose(batch, slots, step)
        if chosen["points"].shape[-1] != points.shape[-1]:
            widths = (chosen["points"].shape[-1], points.shape[-1])
            raise ValueError(f"`bank` and batch must have points of the same columns, got {widths[0]} and {widths[1]}")
        scene, objects = self._occlude(points, mask, chosen)
        used = objects.sum(-1) >= MIN_POINTS
        objects &= used[..., None]
        labels = torch.where(_emptied(batch, scene), -1, batch["labels"])
        result["points"] = torch.cat([points, chosen["points"].flatten(1, 2)], dim=1)
        result["mask"] = torch.cat([scene, objects.flatten(1)], dim=1)
        result["boxes"] = torch.cat([batch["boxes"], chosen["boxes"] * used[..., None]], dim=1)
        result["labels"] = torch.cat([labels, torch.where(used, chosen["labels"], -1)], dim=1)
        numbers = chosen["numbers"][..., None].expand(objects.shape)
        result["source"] = torch.cat([result["source"], torch.where(objects, numbers, -1).flatten(1)], dim=1)
        return result

    def _choose(self, batch: Mapping[str, Tensor], slots: list[tuple[str, int]], step: int) -> dict[str, Tensor]:
        """Objects at free places, one per slot, and which of them are used."""
        points, mask, labels = batch["points"], batch["mask"], batch["labels"]
        keys = sample_keys(batch, self.seed, step)
        taken, used = batch["boxes"], labels >= 0
        found: dict[str, list[Tensor]] = {"points": [], "valid": [], "boxes": [], "labels": [], "numbers": []}
        for place, (label, number) in enumerate(slots):
            pool = self._on_device(label, points)
            draw = uniform(keys, place, 1 + 3 * _TRIES).to(points.dtype)
            pick = (draw[:, 0] * len(pool["boxes"])).long().clamp_max(len(pool["boxes"]) - 1)
            boxes = self._places(pool["boxes"][pick], draw[:, 1:])
            free = ~(bev_overlap(boxes, taken) & used[:, None]).any(-1)
            box = boxes[torch.arange(len(boxes), device=boxes.device), free.int().argmax(1)]
            class_number = self.classes.index(label)
            wanted = free.any(1) & ((labels == class_number).sum(1) + number < self.targets[label])
            height = ground_height(points, box[:, None, :2], mask)[:, 0]
            height = torch.where(height.isnan(), box[:, 2], height + box[:, 5] / 2)
            box = torch.cat([box[:, :2], height[:, None], box[:, 3:]], dim=1)
            taken, used = torch.cat([taken, box[:, None]], dim=1), torch.cat([used, wanted[:, None]], dim=1)
            cloud = rotate_z(pool["points"][pick], box[:, 6])
            cloud = torch.cat([cloud[..., :3] + box[:, None, :3], cloud[..., 3:]], dim=-1)
            inside = torch.arange(self.max_points, device=points.device) < pool["counts"][pick][:, None]
            found["points"].append(cloud)
            found["valid"].append(inside & wanted[:, None])
            found["boxes"].append(box)
            found["labels"].append(torch.full_like(pick, class_number))
            found["numbers"].append(pool["numbers"][pick])
        return {name: torch.stack(values, dim=1) for name, values in found.items()}

    def _places(self, boxes: Tensor, draw: Tensor) -> Tensor:
        (left, right), (near, far) = self.area
        u, v, w = draw.reshape(len(draw), 3, _TRIES).unbind(1)
        fixed = boxes[:, None].expand(-1, _TRIES, -1)
        x, y, yaw = left + (right - left) * u, near + (far - near) * v, (2 * w - 1) * math.pi
        return torch.cat([x[..., None], y[..., None], fixed[..., 2:6], yaw[..., None]], dim=-1)

    def _occlude(self, points: Tensor, mask: Tensor, chosen: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return masks of the remaining points of the frames and of the objects."""
        valid = chosen["valid"]
        cells, ranges = self.grid.cells(chosen["points"].flatten(1, 2))
        cells = torch.where(valid.flatten(1), cells, -1)
        image = self._image(chosen["points"].flatten(1, 2), valid.flatten(1))
        visible = (cells >= 0) & (ranges <= image.gather(1, cells.clamp_min(0)) + TOLERANCE)
        visible &= image.gather(1, cells.clamp_min(0)) < math.inf  # otherwise no beam hits the object there
        first = nearest_ranges(torch.where(visible, cells, -1), ranges, self.grid)
        visible &= ranges <= first.gather(1, cells.clamp_min(0))
        boxes = torch.where(
            valid.any(-1, keepdim=True), chosen["boxes"], chosen["boxes"].new_tensor([1e9] * 3 + [0.0] * 4)
        )
        scene = mask & ~points_in_boxes(points, boxes).any(-1)
        own, distance = self.grid.cells(points)
        own = torch.where(scene, own, -1)
        seen = nearest_ranges(own, distance, self.grid)
        visible &= ranges <= seen.gather(1, cells.clamp_min(0)) + TOLERANCE
        scene &= (own < 0) | (distance <= image.gather(1, own.clamp_min(0)) + TOLERANCE)
        return scene, visible.reshape(valid.shape)

    def _image(self, points: Tensor, valid: Tensor) -> Tensor:
        """Nearest range of an object on each beam, from a three times finer grid with gaps closed."""
        grid = self.grid
        fine = RangeGrid(3 * grid.rows, 3 * grid.columns, grid.lowest, grid.highest)
        cells, ranges = fine.cells(points)
        closed = close_gaps(nearest_ranges(torch.where(valid, cells, -1), ranges, fine), fine, (5, 9))
        return closed.reshape(-1, fine.rows, fine.columns)[:, 1::3, 1::3].flatten(1)

    def _on_device(self, label: str, like: Tensor) -> dict[str, Tensor]:
        """The pool of a class, moved to the device once; padded to ``max_points``."""
        pool = self._pools[label]
        if pool["points"].device != like.device or pool["points"].dtype != like.dtype:
            pool["points"], pool["boxes"] = pool["points"].to(like), pool["boxes"].to(like)
            pool["counts"], pool["numbers"] = pool["counts"].to(like.device), pool["numbers"].to(like.device)
        if pool["points"].shape[1] < self.max_points:
            missing = self.max_points - pool["points"].shape[1]
            pool["points"] = torch.nn.functional.pad(pool["points"], (0, 0, 0, missing))
        return pool


def _emptied(batch: Mapping[str, Tensor], left: Tensor) -> Tensor:
    """Return which boxes lost points and have too few left."""
    inside = points_in_boxes(batch["points"], batch["boxes"])
    before = (inside & batch["mask"][..., None]).sum(1)
    after = (inside & left[..., None]).sum(1)
    return (after < MIN_POINTS) & (after < before)
