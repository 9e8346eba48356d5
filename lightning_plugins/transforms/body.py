"""Objects to insert: as cut out, or completed by their mirror images and by similar objects."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_plugins.data.object_bank import ObjectBank
from lightning_plugins.functional.boxes import rotate_z

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
        """The points placed at the box."""
        points = rotate_z(self.points, self.box[6])
        points[:, :3] += self.box[:3]
        return points


def cut_out(bank: ObjectBank, number: int) -> Body:
    """Take an object of the bank unchanged."""
    one = bank[number]
    points = torch.from_numpy(one.points.copy())
    return Body(points, torch.from_numpy(one.box.copy()), one.label, torch.full((len(points),), number))


def completed(bank: ObjectBank, number: int, fill: float, rng: np.random.Generator) -> Body:
    """Complete an object of the bank by its mirror image and by up to ten candidates.

    Args:
        bank: The objects.
        number: Number of the object.
        fill: Candidates are added until this fraction of the parts is above the object's mean occupancy.
        rng: For choosing candidates.

    Returns:
        The object, whose box grows to hold all points.
    """
    one, occupancy = bank[number], bank.occupancy(number).astype(np.float64)
    level, clouds, chosen = occupancy[occupancy > 0].mean(), [one.points], [number]
    for other in rng.permutation(bank.candidates(number))[:_CANDIDATES].tolist():
        if np.count_nonzero(occupancy > level) / len(occupancy) > fill:
            break
        chosen.append(other)
        clouds.append(bank[other].points)
        occupancy += bank.occupancy(other)
    points, source = np.concatenate(clouds), np.repeat(chosen, [len(cloud) for cloud in clouds])
    if one.label not in _ONE_SIDED:
        points, source = np.concatenate([points, points]), np.concatenate([source, source])
        points[len(points) // 2 :, 1] *= -1
    box = one.box.copy()
    box[3:6] = np.maximum(box[3:6], 2 * np.abs(points[:, :3]).max(axis=0) + np.float32(0.01))
    return Body(torch.from_numpy(points), torch.from_numpy(box), one.label, torch.from_numpy(source))
