"""The whole-body augmentation as it was first written: one object after the other, each over the whole frame."""

import math
from dataclasses import replace

import numpy as np
import torch

from lightning_plugins.functional import (
    RangeGrid,
    bev_overlap,
    close_gaps,
    ground_height,
    nearest_ranges,
    points_in_boxes,
)
from lightning_plugins.transforms.body import Body
from lightning_plugins.transforms.frame import Frame

TOLERANCE = 0.3


def construct(bank, number, fill, rng):
    one = bank[number]
    chosen, occupancy = [number], bank.occupancy(number).astype(np.float64)
    level = occupancy[occupancy > 0].mean()
    for other in rng.permutation(bank.candidates(number))[:10].tolist():
        if (occupancy > level).mean() > fill:
            break
        chosen.append(other)
        occupancy += bank.occupancy(other)
    clouds = [torch.from_numpy(bank[other].points.copy()) for other in chosen]
    source = torch.repeat_interleave(torch.tensor(chosen), torch.tensor([len(cloud) for cloud in clouds]))
    points = torch.cat(clouds)
    if one.label != "Pedestrian":
        mirrored = points.clone()
        mirrored[:, 1] *= -1
        points, source = torch.cat([points, mirrored]), source.repeat(2)
    box = torch.from_numpy(one.box.copy())
    box[3:6] = torch.maximum(box[3:6], 2 * points[:, :3].abs().amax(dim=0) + 0.01)
    return Body(points, box, one.label, source)


def place(body, frame, others, area, rng):
    boxes = body.box[None].repeat(20, 1)
    low, high = zip(*area, (-np.pi, np.pi), strict=True)
    boxes[:, [0, 1, 6]] = torch.from_numpy(rng.uniform(low, high, (20, 3))).to(boxes)
    taken = torch.cat([frame.boxes.to(boxes), *(other.box[None] for other in others)])
    free = (~bev_overlap(boxes, taken).any(dim=1)).nonzero().flatten().tolist()
    if not free:
        return None
    box = boxes[free[0]].clone()
    around = (frame.points[:, 0] - box[0]).abs().le(3) & (frame.points[:, 1] - box[1]).abs().le(3)
    height = ground_height(frame.points[around].to(box), box[None, :2])[0]
    if not height.isnan():
        box[2] = height + box[5] / 2
    return replace(body, box=box)


def insert(frame, bodies, grid):
    clouds = [body.placed().to(frame.points) for body in bodies]
    seen = [object_returns(cloud, grid)[:2] for cloud in clouds]
    stay = [number for number, (cloud, _) in enumerate(seen) if len(cloud) >= 5]
    clouds = [seen[number][0] for number in stay]
    bodies = [replace(bodies[number], source=bodies[number].source[seen[number][1]]) for number in stay]
    if not bodies:
        return frame
    boxes = torch.stack([body.box for body in bodies]).to(frame.points)
    frame = frame.without(points_in_boxes(frame.points, boxes).any(1), min_points=5)
    image = nearest_ranges(*grid.cells(torch.cat(clouds)), grid)
    cells, ranges = grid.cells(frame.points)
    front = torch.minimum(image, nearest_ranges(cells, ranges, grid))
    behind = (cells >= 0) & (ranges > image[cells.clamp_min(0)] + TOLERANCE)
    frame = frame.without(behind, min_points=5)
    for body, cloud in zip(bodies, clouds, strict=True):
        own, distance = grid.cells(cloud)
        left = (own < 0) | (distance <= front[own.clamp_min(0)] + TOLERANCE)
        if int(left.sum()) >= 5:
            frame = Frame(
                torch.cat([frame.points, cloud[left]]),
                torch.cat([frame.boxes, body.box[None].to(frame.boxes)]),
                [*frame.labels, body.label],
                torch.cat([frame.source, body.source[left]]),
            )
    return frame


def object_returns(points, grid):
    cells, ranges = grid.cells(points)
    inside = (cells >= 0).nonzero().flatten()
    if len(inside) == 0:
        return points[:0], inside, points.new_zeros(0, len(points))
    rows, columns = cells[inside] // grid.columns, cells[inside] % grid.columns
    across = (columns - columns[0] + grid.columns // 2) % grid.columns
    finer = fineness(rows), fineness(across)
    fine = RangeGrid(finer[0] * grid.rows, finer[1] * grid.columns, grid.lowest, grid.highest)
    image = nearest_ranges(fine.cells(points[inside])[0], ranges[inside], fine)
    image = image.reshape(fine.rows, fine.columns).roll(fine.columns // 2 - int(columns[0]) * finer[1], 1)
    held = image.isfinite().nonzero()
    height, width = (held.amax(0) - held.amin(0) + 1).tolist()
    spread = math.sqrt(height * (fine.highest - fine.lowest) / fine.rows * width * 2 * math.pi / fine.columns)
    spacing = spread / math.sqrt(max(len(inside) / 2, 1))
    tall, wide = (fine.highest - fine.lowest) / fine.rows, 2 * math.pi / fine.columns
    window = (
        2 * math.ceil(min(1.5 * spacing / tall, 4 * finer[0])) + 1,
        2 * math.ceil(min(1.5 * spacing / wide, 12 * finer[1])) + 1,
    )
    top, left = held.amin(0).tolist()
    part = image[top : top + height, left : left + width]  # around it there is nothing, which a margin stands for
    part = torch.nn.functional.pad(part, (0, window[1], 0, window[0]), value=math.inf)
    shut = close_gaps(part.flatten(), RangeGrid(*part.shape, -0.1, 0.1), window).reshape(part.shape)
    closed = torch.full_like(image, math.inf)
    closed[top : top + height, left : left + width] = shut[:height, :width]
    closed = closed.roll(int(columns[0]) * finer[1] - fine.columns // 2, 1)
    middle = closed[finer[0] // 2 :: finer[0], finer[1] // 2 :: finer[1]]
    row, column = middle.isfinite().nonzero().unbind(1)
    turn = (column - columns[0] + grid.columns // 2) % grid.columns
    order = turn.argsort(stable=True)
    order = order[row[order].argsort(stable=True)]
    row, column, turn = row[order], column[order], turn[order]
    elevation = grid.lowest + (row + 0.5).double() * (grid.highest - grid.lowest) / grid.rows
    azimuth = ((column + 0.5).double() / grid.columns - 0.5) * 2 * math.pi
    reach = middle[row, column].double()
    level = reach * elevation.cos()
    xyz = torch.stack([level * azimuth.cos(), level * azimuth.sin(), reach * elevation.sin()], dim=1).to(points)
    stride = 2 * grid.columns
    steps = points.new_full((len(row), len(points)), math.inf)  # from each return to each point
    steps[:, inside] = ((rows * stride + across)[None] - (row * stride + turn)[:, None]).abs().to(points)
    own = steps.argmin(1)
    return torch.cat([xyz, points[own, 3:]], dim=1), own, steps


def fineness(numbers):
    across = int(numbers.max() - numbers.min()) + 1
    return next(odd for odd in range(3, 999, 2) if odd * across >= 128)
