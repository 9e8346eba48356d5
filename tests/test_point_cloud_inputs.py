"""Wrong arguments of point clouds: each error names the argument, the rule, and what came."""

import math

import numpy as np
import pytest
import torch

from lightning_plugins.callbacks import PointCloudAugmentation
from lightning_plugins.data import ObjectBank, RaycastScenes, SpinningSensor
from lightning_plugins.functional import (
    RangeGrid,
    bev_overlap,
    hidden_points,
    part_occupancy,
    points_in_boxes,
    visible_in_range_image,
)
from lightning_plugins.plots import point_cloud_figure
from lightning_plugins.transforms import (
    BatchAugmentation,
    FlipRotateScale,
    PolarMix,
    WholeBodyAugmentation,
    collate_frames,
)

GENERATED = torch.rand(60, 4, generator=torch.Generator().manual_seed(0)) - 0.5
FRAME = {"points": GENERATED, "boxes": [[0.0, 0, 0, 2, 2, 2, 0]], "labels": ["Car"]}
BANK = ObjectBank.from_frames([FRAME])
EYE, CENTRE = torch.eye(3), (0.0, 0.0, 0.0)
GRID = RangeGrid(4, 8, -0.4, 0.4)
BATCH = collate_frames([{**FRAME, "index": 0}], BANK.classes)


def whole(**arguments):
    return WholeBodyAugmentation(**{"bank": BANK, "targets": {"Car": 3}, **arguments})


def frame(**changes):
    return whole()({**FRAME, **changes})


MISTAKES = {
    "points of integers": (
        lambda: points_in_boxes(torch.ones(2, 3).long(), torch.ones(1, 7)),
        TypeError,
        "`points` must be a floating tensor, got torch.int64",
    ),
    "two coordinates": (
        lambda: points_in_boxes(torch.ones(2, 2), torch.ones(1, 7)),
        ValueError,
        r"`points` must have shape \(\.\.\., N, 3 or more\), got \(2, 2\)",
    ),
    "a box of six": (
        lambda: bev_overlap(torch.ones(1, 6), torch.ones(1, 7)),
        ValueError,
        r"`boxes` must have shape .* got \(1, 6\)",
    ),
    "no parts": (
        lambda: part_occupancy(EYE, torch.ones(3), (1, 0, 1)),
        ValueError,
        "`parts` must be three numbers of at least 1",
    ),
    "size of two": (
        lambda: part_occupancy(EYE, torch.ones(2), (1, 1, 1)),
        ValueError,
        r"`size` must have shape \(3,\), got \(2,\)",
    ),
    "flat viewpoint": (
        lambda: hidden_points(EYE, (0.0, 0.0)),
        ValueError,
        "`viewpoint` three numbers",
    ),
    "radius below the range": (
        lambda: hidden_points(EYE, CENTRE, 0.5),
        ValueError,
        "`radius_factor` is a ratio to the range .* got 0.5",
    ),
    "radius is NaN": (
        lambda: hidden_points(EYE, CENTRE, math.nan),
        ValueError,
        "`radius_factor` must be finite, got nan",
    ),
    "points not finite": (
        lambda: hidden_points(EYE * math.nan, CENTRE),
        ValueError,
        "`points` and `viewpoint` must be finite",
    ),
    "degrees": (
        lambda: RangeGrid(64, 2048, -24.9, 2.0),
        ValueError,
        r"`lowest` is an elevation in radians.*did you mean -0\.4346",
    ),
    "rows upside down": (
        lambda: RangeGrid(64, 2048, 0.1, -0.4),
        ValueError,
        "`lowest` must be below `highest`",
    ),
    "no rows": (
        lambda: RangeGrid(0, 2048, -0.4, 0.1),
        ValueError,
        "`rows` must be at least 1, got 0",
    ),
    "negative tolerance": (
        lambda: visible_in_range_image(EYE, GRID, tolerance=-1.0),
        ValueError,
        "`tolerance` must be at least 0",
    ),
    "mask of another shape": (
        lambda: visible_in_range_image(EYE, GRID, torch.ones(2).bool()),
        ValueError,
        r"`valid` must have shape \(3,\), got \(2,\)",
    ),
    "eight beams": (
        lambda: SpinningSensor(beams=8),
        ValueError,
        "`beams` must be from 16 to 64, got 8",
    ),
    "dropout in percent": (
        lambda: SpinningSensor(dropout=20),
        ValueError,
        r"`dropout` must be in \[0, 1\], got 20; did you mean 0.2",
    ),
    "unknown class of scenes": (
        lambda: RaycastScenes(1, objects={"Truck": 1}),
        ValueError,
        "`objects` must count classes out of .*, got 'Truck'",
    ),
    "no object": (
        lambda: ObjectBank.from_frames([{**FRAME, "boxes": [], "labels": []}]),
        ValueError,
        "`frames` must have an object with at least `min_points=5` points",
    ),
    "negative margin": (
        lambda: ObjectBank.from_frames([FRAME], margin=-0.1),
        ValueError,
        "`margin` must be at least 0",
    ),
    "no bank": (
        lambda: whole(bank=[FRAME]),
        TypeError,
        "`bank` must be an ObjectBank, got list; make one by",
    ),
    "class misspelled": (
        lambda: whole(targets={"car": 3}),
        ValueError,
        "`targets`: the bank has the classes .*, got 'car'; did you mean 'Car'",
    ),
    "targets are a number": (
        lambda: whole(targets=30),
        TypeError,
        r"`targets` must map classes to numbers, such as \{'Car': 30\}, got 30",
    ),
    "negative target": (
        lambda: whole(targets={"Car": -1}),
        ValueError,
        r"`targets\['Car'\]` must be at least 0, got -1",
    ),
    "occluder misspelled": (
        lambda: whole(occluder="range-image"),
        ValueError,
        "`occluder` must be .* did you mean 'range_image'",
    ),
    "stage misspelled": (
        lambda: whole(stages=["placment"]),
        ValueError,
        "`stages` must be .* did you mean 'placement'",
    ),
    "one stage as text": (
        lambda: whole(stages="placement"),
        TypeError,
        r"`stages` must be a sequence of names.*did you mean \['placement'\]",
    ),
    "grid is a pair": (
        lambda: whole(grid=(64, 2048)),
        TypeError,
        r"`grid` must be a RangeGrid, got \(64, 2048\)",
    ),
    "area upside down": (
        lambda: whole(area=((65, 5), (-1, 1))),
        ValueError,
        "`area` must be two rising pairs",
    ),
    "area of one range": (
        lambda: whole(area=(5, 65)),
        ValueError,
        r"`area` must be two pairs, of x and of y, got \(5, 65\)",
    ),
    "fill above one": (
        lambda: whole(fill=84),
        ValueError,
        r"`fill` must be in \[0, 1\], got 84; did you mean 0.84",
    ),
    "negative seed": (
        lambda: whole(seed=-1),
        ValueError,
        "`seed` must be at least 0",
    ),
    "no frame": (
        lambda: whole()([1]),
        TypeError,
        "a frame must be a dict",
    ),
    "key missing": (
        lambda: whole()({"points": EYE}),
        ValueError,
        r"without \['boxes', 'labels'\]",
    ),
    "flat points": (
        lambda: frame(points=torch.ones(4)),
        ValueError,
        "`points` must be floating with shape",
    ),
    "boxes of six": (
        lambda: frame(boxes=np.ones((1, 6))),
        ValueError,
        r"`boxes` must have shape \(m, 7\)",
    ),
    "label missing": (
        lambda: frame(labels=[]),
        ValueError,
        "`labels` must have one name per box, got 0 for 1 boxes",
    ),
    "numbers as labels": (
        lambda: frame(labels=[1]),
        TypeError,
        r"`labels` must be names of classes, got 1 \(int\)",
    ),
    "other features": (
        lambda: whole(targets={"Car": 1}, area=((5, 9), (-9, 9)), stages=["placement"])(
            {**FRAME, "points": EYE, "boxes": [], "labels": []}
        ),
        ValueError,
        "points of the same columns, got 4 and 3",
    ),
    "points of bfloat16": (
        lambda: frame(points=GENERATED.bfloat16()),
        TypeError,
        "`points` must be float16, float32 or float64, got torch.bfloat16",
    ),
    "points with gradients": (
        lambda: frame(points=GENERATED.clone().requires_grad_()),
        ValueError,
        r"`points` must not carry gradients.*points.detach\(\)",
    ),
    "points on a device": (
        lambda: frame(points=GENERATED.to("meta"), boxes=[], labels=[]),
        ValueError,
        "`points` must be on the CPU, got meta; `BatchAugmentation`",
    ),
    "negative index": (
        lambda: frame(index=-1),
        ValueError,
        "`index` must be a number of at least 0, got -1; without it",
    ),
    "name as index": (
        lambda: frame(index="left"),
        ValueError,
        "`index` must be a number of at least 0, got 'left'",
    ),
    "nothing to mix": (
        lambda: PolarMix([]),
        ValueError,
        "`frames` must have at least one frame to mix in",
    ),
    "scale of zero": (
        lambda: FlipRotateScale(scale=(0, 1)),
        ValueError,
        "`scale` must be a smallest and a largest factor above 0",
    ),
    "no frames": (
        lambda: collate_frames([], ["Car"]),
        ValueError,
        "`frames` must have at least one frame",
    ),
    "batch without a mask": (
        lambda: BatchAugmentation(BANK, {"Car": 1})({k: v for k, v in BATCH.items() if k != "mask"}),
        ValueError,
        r"`batch` must have .* without \['mask'\]",
    ),
    "share in percent": (
        lambda: BatchAugmentation(BANK, {"Car": 1})(BATCH, share=50),
        ValueError,
        r"`share` must be in \[0, 1\], got 50",
    ),
    "no points": (
        lambda: BatchAugmentation(BANK, {"Car": 1}, max_points=0),
        ValueError,
        "`max_points` must be at least 1, got 0",
    ),
    "a number as schedule": (
        lambda: PointCloudAugmentation(BANK, {"Car": 1}, schedule=0.5),
        TypeError,
        "`schedule` must be a Schedule, got 0.5",
    ),
    "a folder without a bank": (
        lambda: PointCloudAugmentation("nowhere", {"Car": 1}),
        FileNotFoundError,
        "`bank` must be a folder that `ObjectBank.save` wrote, got 'nowhere'",
    ),
    "figure without source": (
        lambda: point_cloud_figure(FRAME, FRAME),
        ValueError,
        "`after` must have a `source` per point",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    make, error, message = MISTAKES[name]
    with pytest.raises(error, match=message):
        make()
