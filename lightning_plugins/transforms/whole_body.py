"""Whole-body augmentation (DR.CPO), and ground-truth sampling, which it is compared with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lightning_plugins._checks import check_choice, check_fraction, check_non_negative_int
from lightning_plugins.data.object_bank import ObjectBank
from lightning_plugins.functional.boxes import bev_overlap, points_in_boxes, rotate_z
from lightning_plugins.functional.ground import ground_height
from lightning_plugins.functional.range_image import RangeGrid
from lightning_plugins.transforms import occlusion
from lightning_plugins.transforms.frame import Frame, FrameTransform, check_area

STAGES = ("construction", "placement", "self_occlusion", "external_occlusion")
OCCLUDERS = ("range_image", "hull")
MIN_POINTS = 5
GRID = RangeGrid(rows=64, columns=2048, lowest=-0.4346, highest=0.0436)  # about that of KITTI's sensor
_TRIES = 20  # places drawn for an object before it is given up
_CANDIDATES = 10
_ONE_SIDED = frozenset({"Pedestrian"})  # classes whose sides do not mirror each other


@dataclass(frozen=True)
class Body:
    """An object to insert: points in the frame of its box, the box, its class and the object of each point."""

    points: Tensor
    box: Tensor
    label: str
    source: Tensor

    def placed(self) -> Tensor:
        """The points at the place of the box."""
        points = rotate_z(self.points, self.box[6])
        points[:, :3] += self.box[:3]
        return points


class WholeBodyAugmentation(FrameTransform):
    """Insert whole objects anywhere in a frame, and hide what they hide and what hides them.

    An object is completed by its mirror image and by points of others like it (*construction*), put at a free place on
    the ground (*placement*), loses the points that it hides itself (*self_occlusion*), and then it and the frame lose
    those that stand behind one another, in the beams of inserted objects only (*external_occlusion*). Each stage can be
    had without the others. Without construction the object is as it was seen, without placement it stands where it was
    seen. The frame's points inside of inserted boxes are removed in any case.

    Objects and boxes that keep fewer than five points are dropped; a box of the frame that loses none is not touched.

    Args:
        bank: The objects.
        targets: How many objects of each class a frame is filled up to.
        occluder: ``"range_image"`` (the beams of ``grid``, with one return of an object on each beam that meets it) or
            ``"hull"`` (the paper's hidden point removal, which needs SciPy).
        grid: The sensor's cells; by default about those of 64 beams and 2,048 azimuths.
        stages: The stages to take, out of those named above.
        area: Ranges of x and of y for new places, metres.
        fill: Candidates are added until this share of the parts is above the object's mean occupancy; 1 adds all ten.
        seed: Of all random numbers, together with the epoch (`set_epoch`) and the sample.

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
        Shin et al., AAAI 2023, https://arxiv.org/abs/2303.12743. Unlike the paper, an object stands on the ground of
        its new place, and the frame's own points are looked at only where an object can hide them.
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
            rng: All random numbers come from it.

        Returns:
            The augmented frame.
        """
        bodies: list[Body] = []
        for label, target in self.targets.items():
            members = self.bank.members(label)
            for number in rng.choice(members, max(0, target - frame.labels.count(label))):
                body = self.place(self.construct(int(number), rng), frame, bodies, rng)
                bodies += [] if body is None else [body]
        return self.insert(frame, bodies)

    def construct(self, number: int, rng: np.random.Generator) -> Body:
        """Complete an object of the bank, unless the stage is left out.

        Args:
            number: Of the object.
            rng: For the choice of candidates.

        Returns:
            The object in the frame of its box, which grows to hold all points.
        """
        one = self.bank[number]
        if "construction" not in self.stages:
            points = torch.from_numpy(one.points.copy())
            return Body(points, torch.from_numpy(one.box.copy()), one.label, torch.full((len(points),), number))
        chosen, occupancy = [number], self.bank.occupancy(number).astype(np.float64)
        level = occupancy[occupancy > 0].mean()
        for other in rng.permutation(self.bank.candidates(number))[:_CANDIDATES].tolist():
            if (occupancy > level).mean() > self.fill:
                break
            chosen.append(other)
            occupancy += self.bank.occupancy(other)
        clouds = [torch.from_numpy(self.bank[other].points.copy()) for other in chosen]
        source = torch.repeat_interleave(torch.tensor(chosen), torch.tensor([len(cloud) for cloud in clouds]))
        points = torch.cat(clouds)
        if one.label not in _ONE_SIDED:
            mirrored = points.clone()
            mirrored[:, 1] *= -1
            points, source = torch.cat([points, mirrored]), source.repeat(2)
        box = torch.from_numpy(one.box.copy())
        box[3:6] = torch.maximum(box[3:6], 2 * points[:, :3].abs().amax(dim=0) + 0.01)
        return Body(points, box, one.label, source)

    def place(self, body: Body, frame: Frame, others: Sequence[Body], rng: np.random.Generator) -> Body | None:
        """Find a place for an object: a new one, or the one where it was seen if the stage is left out.

        Args:
            body: The object.
            frame: The frame, whose boxes are in the way and whose points tell the ground.
            others: Objects that are in the way too.
            rng: For the place.

        Returns:
            The object at its place, or None if there is none without an overlap in bird's-eye view.
        """
        boxes = body.box[None].repeat(_TRIES if "placement" in self.stages else 1, 1)
        if "placement" in self.stages:
            low, high = (
                [*side, angle] for side, angle in zip(zip(*self.area, strict=True), (-np.pi, np.pi), strict=True)
            )
            boxes[:, [0, 1, 6]] = torch.from_numpy(rng.uniform(low, high, (_TRIES, 3))).to(boxes)
        taken = torch.cat([frame.boxes.to(boxes), *(other.box[None] for other in others)])
        free = (~bev_overlap(boxes, taken).any(dim=1)).nonzero().flatten().tolist()
        if not free:
            return None
        box = boxes[free[0]].clone()
        if "placement" in self.stages:
            around = (frame.points[:, 0] - box[0]).abs().le(3) & (frame.points[:, 1] - box[1]).abs().le(3)
            height = ground_height(frame.points[around].to(box), box[None, :2])[0]
            if not height.isnan():
                box[2] = height + box[5] / 2
        return replace(body, box=box)

    def insert(self, frame: Frame, bodies: Sequence[Body]) -> Frame:
        """Put placed objects into a frame, with the stages of occlusion that are taken.

        Args:
            frame: The frame.
            bodies: The objects.

        Returns:
            The frame with them.

        Raises:
            ValueError: If the objects' points have not as many columns as the frame's.
        """
        for body in bodies:
            if body.points.shape[1] != frame.points.shape[1]:
                raise ValueError(
                    f"`bank` and frame must have points of the same columns, got {body.points.shape[1]} and "
                    f"{frame.points.shape[1]}"
                )
        clouds = [body.placed().to(frame.points) for body in bodies]
        seen = [self.returns(cloud) for cloud in clouds]
        bodies = [replace(body, source=body.source[own]) for body, (_, own) in zip(bodies, seen, strict=True)]
        clouds = [cloud for cloud, _ in seen]
        stay = [number for number, cloud in enumerate(clouds) if len(cloud) >= MIN_POINTS]
        bodies, clouds = [bodies[number] for number in stay], [clouds[number] for number in stay]
        if not bodies:
            return frame
        boxes = torch.stack([body.box for body in bodies]).to(frame.points)
        frame = frame.without(_inside_any(frame.points, boxes), min_points=MIN_POINTS)
        if "external_occlusion" in self.stages:
            if self.occluder == "hull":
                behind, hidden = occlusion.hidden_by_hull(frame.points, clouds)
            else:
                whole = "self_occlusion" in self.stages  # else they are not what a sensor gets back
                shadows = clouds if whole else [occlusion.object_returns(cloud, self.grid)[0] for cloud in clouds]
                behind, hidden = occlusion.hidden_in_range_image(frame.points, clouds, shadows, self.grid)
            frame = frame.without(behind, min_points=MIN_POINTS)
        else:
            hidden = [torch.zeros(len(cloud), dtype=torch.bool) for cloud in clouds]
        return _merged(frame, bodies, clouds, hidden)

    def returns(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Take what the sensor gets back of an object alone; all its points, if self-occlusion is left out.

        Args:
            points: Shape ``(n, C)``, at their place.

        Returns:
            Points of shape ``(k, C)``, and the number of the point that each of them is or has its features from.
        """
        if "self_occlusion" not in self.stages:
            return points, torch.arange(len(points))
        if self.occluder == "range_image":
            return occlusion.object_returns(points, self.grid)
        kept = occlusion.visible_by_hull(points).nonzero().flatten()
        return points[kept], kept


class GroundTruthSampling(WholeBodyAugmentation):
    """Paste objects of a bank where they were seen, with all their points, as detection frameworks do.

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
        TypeError: If it is none.
    """
    if not isinstance(bank, ObjectBank):
        raise TypeError(
            f"`bank` must be an ObjectBank, got {type(bank).__name__}; make one by `ObjectBank.from_frames` or `load`"
        )
    return bank


def check_targets(bank: ObjectBank, targets: Mapping[str, int]) -> dict[str, int]:
    """Return the targets as a dictionary.

    Raises:
        TypeError: If they are no mapping from names to ints.
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


def _inside_any(points: Tensor, boxes: Tensor) -> Tensor:
    inside = torch.zeros(len(points), dtype=torch.bool)
    for box in boxes:
        reach = float(box[3:5].norm()) / 2
        near = ((points[:, 0] - box[0]).abs() <= reach) & ((points[:, 1] - box[1]).abs() <= reach)
        rows = near.nonzero().flatten()
        inside[rows] |= points_in_boxes(points[rows], box[None])[:, 0]
    return inside


def _merged(frame: Frame, bodies: Sequence[Body], clouds: Sequence[Tensor], hidden: Sequence[Tensor]) -> Frame:
    """The frame with the objects that still have points enough."""
    parts = [frame.points], [frame.boxes], [*frame.labels], [frame.source]
    for body, cloud, gone in zip(bodies, clouds, hidden, strict=True):
        if int((~gone).sum()) >= MIN_POINTS:
            parts[0].append(cloud[~gone])
            parts[1].append(body.box[None].to(frame.boxes))
            parts[2].append(body.label)
            parts[3].append(body.source[~gone].to(frame.source))
    return Frame(torch.cat(parts[0]), torch.cat(parts[1]), parts[2], torch.cat(parts[3]))
