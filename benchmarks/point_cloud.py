"""Augmented frames compared with re-simulated scans, hidden points with geometry; times, memory, average precision.

    python benchmarks/point_cloud.py hidden rescan time bank memory overlaps frame
    python benchmarks/point_cloud.py precision --seeds 5       # hours; goes on where it was stopped
    python benchmarks/point_cloud.py --page docs/benchmarks/point_cloud.md

Results are stored in `point_cloud.json` next to this file. Times are CPU times of one thread.
"""

import argparse
import json
import math
import resource
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import point_cloud_hidden
import torch
from _report import describe_machine

from lightning_plugins.data import ObjectBank, RaycastScenes, Shape, SpinningSensor, frame_of, scan
from lightning_plugins.functional import bev_overlap, hidden_points, visible_in_range_image
from lightning_plugins.transforms import GroundTruthSampling, WholeBodyAugmentation
from lightning_plugins.transforms.frame import Frame

STORE = Path(__file__).with_suffix(".json")
SENSOR = SpinningSensor(beams=64, columns=2048, lowest=-24.0, highest=2.0, noise=0.0)
SIZE = (4.2, 1.8, 1.55)
DISTANCES = (5, 10, 20, 30, 40, 50, 60)
PLACES = 12  # per distance


def cuboid(distance: float, azimuth: float, yaw: float, height: float = SENSOR.height) -> Shape:
    x, y = distance * math.cos(azimuth), distance * math.sin(azimuth)
    return Shape((x, y, SIZE[2] / 2 - height, *SIZE, yaw), label="Car")


def rescan() -> dict[str, object]:
    """Frames with an inserted cuboid compared with scans of the scene with that cuboid in it."""
    rng = np.random.default_rng(0)
    views = [cuboid(rng.uniform(5, 25), rng.uniform(-3, 3), rng.uniform(-3, 3)) for _ in range(150)]
    bank = ObjectBank.from_frames(frame_of([view], scan([view], SENSOR)) for view in views)
    noisy = ObjectBank.from_frames(frame_of([view], scan([view], replace(SENSOR, noise=0.02), rng)) for view in views)
    methods = {
        "range image": WholeBodyAugmentation(bank, {}, grid=SENSOR.grid),
        "range image, all ten candidates": WholeBodyAugmentation(bank, {}, grid=SENSOR.grid, fill=1.0),
        "hull": WholeBodyAugmentation(bank, {}, grid=SENSOR.grid, occluder="hull"),
        "hull, range noise 0.02 m": WholeBodyAugmentation(noisy, {}, grid=SENSOR.grid, occluder="hull"),
        "range image, range noise 0.02 m": WholeBodyAugmentation(noisy, {}, grid=SENSOR.grid),
        "range image, not completed": WholeBodyAugmentation(
            bank, {}, grid=SENSOR.grid, stages=["placement", "self_occlusion", "external_occlusion"]
        ),
        "ground-truth sampling": GroundTruthSampling(bank, {}),
    }
    sums = {name: defaultdict(list) for name in methods}
    scenery = RaycastScenes(PLACES, SENSOR, seed=5, objects={}, scenery=10)
    for distance in DISTANCES:
        for number in range(PLACES):
            base = scenery.shapes(number)
            view = cuboid(distance, rng.uniform(-3, 3), rng.uniform(-3, 3))
            if bev_overlap(torch.tensor([view.box]), torch.tensor([shape.box for shape in base])).any():
                continue
            empty, truth = scan(base, SENSOR), scan([*base, view], SENSOR)
            seen = scan([view], SENSOR)
            wanted = truth.cells[truth.hit == len(base)]
            if len(wanted) < 5:
                continue
            frame = Frame.read({"points": empty.points, "boxes": np.zeros((0, 7)), "labels": []})
            for name, method in methods.items():
                if method.occluder == "hull" and number % 3:  # a hull of 90,000 points takes its time
                    continue
                if name == "ground-truth sampling":  # a bank object seen at exactly that place
                    own = ObjectBank.from_frames([frame_of([view], seen)])
                    body = GroundTruthSampling(own, {}).construct(0, rng)
                else:
                    body = method.construct(int(rng.integers(len(method.bank))), rng)
                    body.box[[0, 1, 6]] = torch.tensor([view.box[0], view.box[1], view.box[6]])
                    body.box[2] = view.box[2]
                found = method.insert(frame, [body])
                agree = score(found, set(wanted.tolist()))
                sums[name][distance].append((*agree, len(wanted)))
        for name in methods:
            print(distance, name, summary(sums[name][distance]), flush=True)
    return {name: {str(d): summary(rows) for d, rows in by.items()} for name, by in sums.items()}


def score(found: Frame, wanted: set[int]) -> tuple[int, int, int, int, int]:
    """Common and all cells of the object; the same for cells with their visible points; the object's points."""
    cells = SENSOR.grid.cells(found.points)[0]
    mine = found.source >= 0
    objects = set(cells[mine].tolist()) - {-1}
    scene = set(cells[~mine].tolist()) & (objects | wanted)
    found_pairs = {(cell, True) for cell in objects} | {(cell, False) for cell in scene}
    pairs = {(cell, True) for cell in wanted} | {(cell, False) for cell in scene - wanted}
    both, either = len(objects & wanted), len(objects | wanted)
    return both, either, len(found_pairs & pairs), len(found_pairs | pairs), int(mine.sum())


def summary(rows: list[tuple[int, ...]]) -> dict[str, float]:
    both, either, same, pairs, points, wanted = (sum(column) for column in zip(*rows, strict=True))
    ratio = points / wanted
    return {"object": both / either, "frame": same / pairs, "points": ratio, "places": len(rows), "wanted": wanted}


def placed_by(transform: WholeBodyAugmentation, frame: dict) -> int:
    """Count the objects that find a free place; those hit by fewer than five beams are dropped later."""
    with mock.patch.object(transform, "_on_ground", side_effect=transform._on_ground) as placing:
        transform(frame)
    return len(placing.call_args.args[0])


def timing() -> dict[str, object]:
    """CPU seconds of a frame: median and minimum of interleaved runs."""
    small = RaycastScenes(40, SpinningSensor(beams=32, columns=1024, lowest=-22, highest=3), seed=1)
    large = RaycastScenes(1, SpinningSensor(beams=64, columns=2300, lowest=-24, highest=4), seed=2, scenery=40)
    bank = ObjectBank.from_frames(small)
    cases = {}
    whole, near = ((5.0, 65.0), (-35.0, 35.0)), ((5.0, 35.0), (-20.0, 20.0))  # near, fewer objects are dropped
    for name, frames, count, limit, area in (
        ("17,000 and 10", small, 10, 17_000, whole),
        ("17,000 and 10, within 40 m", small, 10, 17_000, near),
        ("120,000 and 40", large, 40, 120_000, whole),
        ("120,000 and 40, within 40 m", large, 40, 120_000, near),
    ):
        frame = frames[0]
        keep = np.random.default_rng(0).permutation(len(frame["points"]))[:limit]
        frame = {"points": frame["points"][keep], "boxes": np.zeros((0, 7), np.float32), "labels": []}
        for occluder in ("range_image", "hull"):
            targets = {"Car": count // 2, "Pedestrian": count // 4, "Cyclist": count - count // 2 - count // 4}
            transform = WholeBodyAugmentation(bank, targets, occluder=occluder, grid=frames.sensor.grid, area=area)
            cases[f"{name}, {occluder}"] = (transform, frame)
    times = defaultdict(list)
    added = {}
    for run in range(16):
        for name, (transform, frame) in cases.items():
            transform.set_epoch(run)
            began = time.process_time()
            result = transform(frame)
            times[name].append(time.process_time() - began)
            added[name] = len(result["boxes"])
    rows = {
        name: {
            "points": len(cases[name][1]["points"]),
            "placed": placed_by(*cases[name]),
            "boxes": added[name],
            "ms": 1e3 * statistics.median(values[1:]),
            "fastest_ms": 1e3 * min(values),
        }
        for name, values in times.items()
    }
    print(rows)
    return rows


def bank_time() -> dict[str, object]:
    """CPU seconds to build a bank of about 1,000 objects from existing frames."""
    frames = [RaycastScenes(140, seed=3)[number] for number in range(140)]
    began = time.process_time()
    bank = ObjectBank.from_frames(frames)
    found = {"objects": len(bank), "seconds": time.process_time() - began}
    print(found)
    return found


def memory() -> dict[str, object]:
    """Largest resident memory over 10,000 frames; a small sensor suffices to find leaks."""
    scenes = RaycastScenes(8, SpinningSensor(beams=16, columns=256), seed=4)
    frames = [scenes[number] for number in range(8)]
    transform = WholeBodyAugmentation(ObjectBank.from_frames(frames), {"Car": 8}, grid=scenes.sensor.grid)
    sizes = {}
    for number in range(10_000):
        transform({**frames[number % 8], "index": number})
        if number + 1 in (1_000, 2_500, 5_000, 10_000):
            sizes[str(number + 1)] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(number + 1, sizes, flush=True)
    return sizes


def overlaps() -> dict[str, object]:
    """Overlaps among 10,000 placed objects and the boxes of their frames."""
    scenes = RaycastScenes(8, SpinningSensor(beams=16, columns=256), seed=6)
    frames = [scenes[number] for number in range(8)]
    transform = WholeBodyAugmentation(ObjectBank.from_frames(frames), {"Car": 20, "Pedestrian": 20}, seed=1)
    placed = found = frame_number = 0
    while placed < 10_000:
        frame, rng = Frame.read(frames[frame_number % 8]), np.random.default_rng([7, frame_number])
        bodies = []
        for number in rng.integers(len(transform.bank), size=40):
            body = transform.place(transform.construct(int(number), rng), frame, bodies, rng)
            bodies += [] if body is None else [body]
        boxes = torch.cat([frame.boxes, torch.stack([body.box for body in bodies])])
        apart = bev_overlap(boxes, boxes).fill_diagonal_(False)
        apart[: len(frame.boxes), : len(frame.boxes)] = False
        placed, found, frame_number = placed + len(bodies), found + int(apart.sum()), frame_number + 1
    print(placed, found)
    return {"placed": placed, "overlaps": found}


def frame_pass() -> dict[str, object]:
    """Count a frame's own points that hidden point removal of the whole frame would remove, though all were seen."""
    frame = RaycastScenes(1, SpinningSensor(beams=64, columns=1024), seed=8)[0]
    points = torch.from_numpy(frame["points"][:20_000])
    hull = float(hidden_points(points, (0.0, 0.0, 0.0), 1e3).double().mean())
    image = float((~visible_in_range_image(points, SENSOR.grid)).double().mean())
    return {"points": len(points), "hull": hull, "range image": image}


PARTS = {
    "hidden": point_cloud_hidden.run,
    "rescan": rescan,
    "time": timing,
    "bank": bank_time,
    "memory": memory,
    "overlaps": overlaps,
    "frame": frame_pass,
}


def load() -> dict[str, object]:
    return json.loads(STORE.read_text()) if STORE.exists() else {}


def keep(name: str, found: object) -> None:
    results = load()
    results[name] = found
    results.setdefault("machine", {})[name] = describe_machine("cpu")
    partial = STORE.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(STORE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "precision", []])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.parts:
        if name == "precision":
            import point_cloud_precision

            point_cloud_precision.run(arguments.seeds, load, keep)
        else:
            keep(name, PARTS[name]())
    if arguments.page is not None:
        import point_cloud_page

        arguments.page.write_text(point_cloud_page.page(load()))


if __name__ == "__main__":
    sys.exit(main())
