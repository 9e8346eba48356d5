"""Whole-body augmentation (DR.CPO), and ground-truth sampling as a baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lightning_plugins._checks import check_choice, check_fraction, check_non_negative_int
from lightning_plugins.data.object_bank import ObjectBank
from lightning_plugins.functional.range_image import RangeGrid
from lightning_plugins.transforms import occlusion
from lightning_plugins.transforms.body import Body, completed, cut_out
from lightning_plugins.transforms.frame import Frame, FrameTransform, check_area
from lightning_plugins.transforms.places import BirdsEye, first_free
from lightning_plugins.transforms.returns import object_returns

STAGES = ("construction", "placement", "self_occlusion", "external_occlusion")
OCCLUDERS = ("range_image", "hull")
MIN_POINTS = 5
GRID = RangeGrid(rows=64, columns=2048, lowest=-0.4346, highest=0.0436)  # about that of the KITTI sensor
_TRIES = 20  # number of random places tried per object


class WholeBodyAugmentation(FrameTransform):
    """Insert whole objects anywhere in a frame, with occlusion in both directions.

    An object is completed by its mirror image and by points of similar objects (*construction*), put at a free place on
    the ground (*placement*), loses the points that it occludes itself (*self_occlusion*), and then object and frame
    lose the points that are behind one another, only in the beams of inserted objects (*external_occlusion*). Each
    stage can be used without the others. Without construction the object is used as seen, without placement it stays
    where it was seen. The frame's points inside inserted boxes are always removed.

    Objects and boxes that keep fewer than five points are dropped; a box of the frame that loses none is unchanged.

    Args:
        bank: The objects.
        targets: How many objects of each class a frame is filled up to.
        occluder: ``"range_image"`` (the beams of ``grid``, with one return of an object on each beam that hits it) or
            ``"hull"`` (the paper's hidden point removal, which needs SciPy).
        grid: The sensor's cells; by default about those of 64 beams and 2,048 azimuths.
        stages: The stages to apply, among those named above.
        area: Ranges of x and of y for new places, metres.
        fill: Candidates are added until this fraction of the parts is above the object's mean occupancy; 1 adds all
            ten.
        seed: Seed of all random numbers, together with the epoch (`set_epoch`) and the sample.

    Raises:
        ValueError: If an argument is out of range, or a class is not in the bank.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> from lightning_plugins.data import RaycastScenes
        >>> scenes = RaycastScenes(3)
        >>> augment = WholeBodyAugmentation(ObjectBank.from_frames(scenes), {"Car": 8}, grid=scenes.sensor.grid)
        >>> frame = augment(scenes[0])
        >>> sorted(frame), len(frame["labels"]) == len(frame["boxes"])
        (['boxes', 'index', 'labels', 'points', 'source'], True)

    Source:
        Shin et al., AAAI 2023, https://arxiv.org/abs/2303.12743. Unlike in the paper, an object stands on the ground of
        its new place, and the frame's own points are checked only where an object can occlude them.
    """

    def __init__(
        self,
        bank: ObjectBank,
        targets: Mapping[str, int],
        *,
        occluder: str = "range_image",
        grid: RangeGrid | None = None,
        stages: Sequence[str] = STAGES,
        area: Sequence[Sequence[float]] = ((5.0, 65.0), (-35.0, 35.0)),
        fill: float = 0.84,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.bank, self.targets = check_bank(bank), check_targets(bank, targets)
        self.occluder = check_choice("occluder", occluder, OCCLUDERS)
        if grid is not None and not isinstance(grid, RangeGrid):
            raise TypeError(f"`grid` must be a RangeGrid, got {grid!r} ({type(grid).__name__})")
        self.grid = grid or GRID
        if isinstance(stages, str | bytes) or not isinstance(stages, Sequence):
            raise TypeError(f"`stages` must be a sequence of names, got {stages!r}; did you mean [{stages!r}]?")
        self.stages = tuple(check_choice("stages", stage, STAGES) for stage in stages)
        self.area = check_area(area)
        self.fill = check_fraction("fill", fill)

    def augment(self, frame: Frame, rng: np.random.Generator) -> Frame:
        """Insert objects into a frame.

        Args:
            frame: The frame.
            rng: Source of all random numbers.

        Returns:
            The augmented frame.
        """
        bodies: list[Body] = []
        taken = list(frame.boxes)
        for label, target in self.targets.items():
            members = self.bank.members(label)
            for number in rng.choice(members, max(0, target - frame.labels.count(label))):
                body = self._free(self.construct(int(number), rng), taken, rng)
                if body is not None:
                    bodies.append(body)
                    taken.append(body.box)
        around = BirdsEye(frame.points)
        return self._insert(frame, self._on_ground(bodies, around), around)

    def construct(self, number: int, rng: np.random.Generator) -> Body:
        """Complete an object of the bank, unless the stage is disabled.

        Args:
            number: Of the object.
            rng: For the choice of candidates.

        Returns:
            The object in the frame of its box, which grows to hold all points.
        """
        if "construction" not in self.stages:
            return cut_out(self.bank, number)
        return completed(self.bank, number, self.fill, rng)

    def place(self, body: Body, frame: Frame, others: Sequence[Body], rng: np.random.Generator) -> Body | None:
        """Find a place for an object: a new one, or the original one if the stage is disabled.

        Args:
            body: The object.
            frame: The frame, whose boxes are obstacles and whose points define the ground.
            others: Objects that are obstacles too.
            rng: For the place.

        Returns:
            The placed object, or None if there is no place without an overlap in bird's-eye view.
        """
        free = self._free(body, [*frame.boxes, *(other.box for other in others)], rng)
        return None if free is None else self._on_ground([free], BirdsEye(frame.points))[0]

    def _free(self, body: Body, taken: Sequence[Tensor], rng: np.random.Generator) -> Body | None:
        """The object at a free place, at its original height."""
        boxes = body.box[None].repeat(_TRIES if "placement" in self.stages else 1, 1)
        if "placement" in self.stages:
            low, high = (
                [*side, angle] for side, angle in zip(zip(*self.area, strict=True), (-np.pi, np.pi), strict=True)
            )
            boxes[:, [0, 1, 6]] = torch.from_numpy(rng.uniform(low, high, (_TRIES, 3))).to(boxes)
        first = first_free(boxes, taken)
        return None if first is None else replace(body, box=boxes[first])

    def _on_ground(self, bodies: Sequence[Body], around: BirdsEye) -> list[Body]:
        """The objects moved to the ground of the frame, if they have a new place and there are enough points."""
        if "placement" not in self.stages or not bodies:
            return list(bodies)
        boxes = torch.stack([body.box for body in bodies])
        heights = torch.from_numpy(around.ground(boxes[:, :2].numpy())).to(boxes)
        boxes[:, 2] = torch.where(heights.isnan(), boxes[:, 2], heights + boxes[:, 5] / 2)
        return [replace(body, box=box) for body, box in zip(bodies, boxes, strict=True)]

    def insert(self, frame: Frame, bodies: Sequence[Body]) -> Frame:
        """Insert placed objects into a frame, with the selected occlusion stages.

        Args:
            frame: The frame.
            bodies: The objects.

        Returns:
            The frame with them.

        Raises:
            ValueError: If the objects' points and the frame's differ in their number of columns.
        """
        return self._insert(frame, bodies, BirdsEye(frame.points))

    def _insert(self, frame: Frame, bodies: Sequence[Body], around: BirdsEye) -> Frame:
        for body in bodies:
            if body.points.shape[1] != frame.points.shape[1]:
                raise ValueError(
                    f"`bank` and frame must have points of the same columns, got {body.points.shape[1]} and "
                    f"{frame.points.shape[1]}"
                )
        seen = self._returns([body.placed().to(frame.points) for body in bodies])
        stay = [number for number, (cloud, _) in enumerate(seen) if len(cloud) >= MIN_POINTS]
        clouds = [seen[number][0] for number in stay]
        bodies = [replace(bodies[number], source=bodies[number].source[seen[number][1]]) for number in stay]
        if not bodies:
            return frame
        boxes = torch.stack([body.box for body in bodies]).to(frame.points)
        frame = frame.without(around.inside(boxes), min_points=MIN_POINTS)
        if "external_occlusion" in self.stages:
            behind, hidden = self._occlude(frame, clouds)
            frame = frame.without(behind, min_points=MIN_POINTS)
        else:
            hidden = [torch.zeros(len(cloud), dtype=torch.bool) for cloud in clouds]
        return _merged(frame, bodies, clouds, hidden)

    def _returns(self, clouds: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return each object's own returns and the indices of their points; all points if the stage is disabled."""
        if "self_occlusion" not in self.stages:
            return [(cloud, torch.arange(len(cloud))) for cloud in clouds]
        if self.occluder == "range_image":
            return object_returns(clouds, self.grid)
        kept = [occlusion.visible_by_hull(cloud).nonzero().flatten() for cloud in clouds]
        return [(cloud[numbers], numbers) for cloud, numbers in zip(clouds, kept, strict=True)]

    def _occlude(self, frame: Frame, clouds: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Mark the hidden points of the frame and of each object."""
        if self.occluder == "hull":
            return occlusion.hidden_by_hull(frame.points, clouds)
        shadows = clouds
        if "self_occlusion" not in self.stages:  # all points are present, unlike in a scan
            shadows = [cloud for cloud, _ in object_returns(clouds, self.grid)]
        return occlusion.hidden_in_range_image(frame.points, clouds, shadows, self.grid)


class GroundTruthSampling(WholeBodyAugmentation):
    """Paste objects of a bank at their original place, with all their points, as detection frameworks do.

    Args:
        bank: The objects.
        targets: How many objects of each class a frame is filled up to.
        seed: As for `WholeBodyAugmentation`.

    Raises:
        ValueError: If an argument is out of range, or a class is not in the bank.
        TypeError: If an argument is of the wrong type.

    Source:
        Yan, Mao & Li, SECOND, Sensors 2018.
    """

    def __init__(self, bank: ObjectBank, targets: Mapping[str, int], *, seed: int = 0) -> None:
        super().__init__(bank, targets, stages=(), seed=seed)


def check_bank(bank: ObjectBank) -> ObjectBank:
    """Return the bank.

    Raises:
        TypeError: If it is not an `ObjectBank`.
    """
    if not isinstance(bank, ObjectBank):
        raise TypeError(
            f"`bank` must be an ObjectBank, got {type(bank).__name__}; make one by `ObjectBank.from_frames` or `load`"
        )
    return bank


def check_targets(bank: ObjectBank, targets: Mapping[str, int]) -> dict[str, int]:
    """Return the targets as a dictionary.

    Raises:
        TypeError: If they are not a mapping from names to ints.
        ValueError: If one is negative, or its class is not in the bank.
    """
    if not isinstance(targets, Mapping):
        raise TypeError(f"`targets` must map classes to numbers, such as {{'Car': 30}}, got {targets!r}")
    for label, count in targets.items():
        check_non_negative_int(f"targets[{label!r}]", count)
        try:
            bank.members(label)
        except ValueError as error:
            raise ValueError(f"`targets`: {error}") from None
    return dict(targets)


def _merged(frame: Frame, bodies: Sequence[Body], clouds: Sequence[Tensor], hidden: Sequence[Tensor]) -> Frame:
    """The frame with the objects that still have enough points."""
    parts = [frame.points], [frame.boxes], [*frame.labels], [frame.source]
    for body, cloud, gone in zip(bodies, clouds, hidden, strict=True):
        if int((~gone).sum()) >= MIN_POINTS:
            parts[0].append(cloud[~gone])
            parts[1].append(body.box[None].to(frame.boxes))
            parts[2].append(body.label)
            parts[3].append(body.source[~gone].to(frame.source))
    return Frame(torch.cat(parts[0]), torch.cat(parts[1]), parts[2], torch.cat(parts[3]))
