"""Write the page of the point cloud measurements that `point_cloud.py` stored."""

import statistics
from typing import Any

from _report import half_width, markdown_table, mean_and_interval

# ruff: noqa: E501 - the page's own lines
INTRODUCTION = """# Whole-body augmentation of point clouds

`benchmarks/point_cloud.py` writes this page from its stored measurements. All data are generated: nothing here says
anything about KITTI or another recorded data set. Times are CPU times of one thread, on a shared machine."""

RESCAN = """A cuboid of a car's size is inserted into a frame of walls and poles, and compared with a new scan of the same scene
with that cuboid in it (64 beams, 2,048 azimuths, no noise). *IoU of beams* counts the beams that return from the object.
*IoU of the frame* counts the points seen on all beams that return from the object in either scan, so a point of the frame
that should be hidden but is still there counts as wrong. *Points* is the object's number of points relative to the new
scan. The bank holds the same cuboid seen from 5 to 25 m; range noise, if any, is 0.02 m. Ground-truth sampling pastes an
object that was seen at exactly the same place: its own points are correct except for ground and range margins of its box,
but the points that it should hide remain."""

TIME = """Sixteen frames per case, with the cases interleaved, in CPU time; the machine was shared, so the fastest time is more
informative than the median. For the last frame: the number of objects that found a free place, and the number left after
dropping those hit by fewer than five beams."""

HIDDEN = """`hidden_points` on 20,000 points of a sphere of radius 1, and on 5,000 points of a car's box with 0.02 m of
noise under the paper's radius. *Agrees* is the fraction of points classified alike, as visible or as hidden.
Open3D{version}."""

OTHERS = {"none": "no augmentation"}
PRECISION = """Cars in generated frames, detected by the small grid network of `examples/point_cloud_augmentation.py`: 300 steps of four frames,
scored on 60 other frames. The seed determines the network, the augmentation and which of 100 frames have labels.
Intervals are 95 % (Student's t over the seeds); differences are paired by seed."""


def page(results: dict[str, Any]) -> str:
    parts = [INTRODUCTION]
    if "rescan" in results:
        rows = [
            [method, distance, f"{r['object']:.3f}", f"{r['frame']:.3f}", f"{r['points']:.2f}", str(r["places"])]
            for method, by in results["rescan"].items()
            for distance, r in by.items()
        ]
        header = ["occluder", "distance (m)", "IoU of beams", "IoU of the frame", "points", "places"]
        parts += ["## Against a re-simulated scan", RESCAN, markdown_table(header, rows)]
    if "hidden" in results:
        parts += _hidden(results["hidden"])
    if "time" in results:
        rows = [
            [name, str(r["points"]), str(r["placed"]), str(r["boxes"]), f"{r['ms']:.0f}", f"{r['fastest_ms']:.0f}"]
            for name, r in results["time"].items()
        ]
        parts += [
            "## Time of a frame",
            TIME,
            markdown_table(["case", "points", "placed", "left", "median ms", "fastest ms"], rows),
        ]
    parts += _small(results)
    parts += _precision(results)
    machines = [f"{name}: {text}" for name, text in results.get("machine", {}).items()]
    parts += ["## Where this was measured", "\n".join(f"- {line}" for line in machines)]
    return "\n\n".join(parts) + "\n"


def _small(results: dict[str, Any]) -> list[str]:
    lines = []
    if "bank" in results:
        lines.append(
            f"- A bank of {results['bank']['objects']} objects takes {results['bank']['seconds']:.1f} s to build."
        )
    if "memory" in results:
        sizes = ", ".join(f"{size:.0f} MiB after {count}" for count, size in results["memory"].items())
        lines.append(f"- Largest resident memory while processing frames: {sizes}.")
    if "overlaps" in results:
        found = results["overlaps"]
        lines.append(f"- Overlaps between {found['placed']} placed objects and the frames' own: {found['overlaps']}.")
    if "frame" in results:
        found = results["frame"]
        lines.append(
            f"- Applied to the whole frame ({found['points']} points, all of which were seen), hidden point removal would remove "
            f"{100 * found['hull']:.0f} % (hull, radius factor 1,000)."
        )
    return ["## Bank, memory, placement", "\n".join(lines)] if lines else []


def _hidden(results: dict[str, Any]) -> list[str]:
    sphere = [
        [
            r["by"],
            *(f"{r[key]:g}" for key in ("distance", "factor")),
            f"{r['recall']:.4f}",
            f"{r['precision']:.3f}",
            f"{r['agree']:.4f}",
        ]
        for r in results["sphere"]
    ]
    car = [
        [
            f"{r['distance']:g}",
            *(str(r["kept"].get(name, "")) for name in ("ours", "Open3D")),
            f"{r['agree'].get('Open3D', 1):.4f}",
        ]
        for r in results["car"]
    ]
    version = f" is {results['open3d']}" if results["open3d"] else " was not installed"
    return [
        "## Hidden points, and Open3D's",
        HIDDEN.format(version=version),
        markdown_table(["by", "distance", "radius factor", "recall", "precision", "agrees with ours"], sphere),
        markdown_table(["distance of the car (m)", "kept by ours", "kept by Open3D", "agrees"], car),
    ]


def _precision(results: dict[str, Any]) -> list[str]:
    by: dict[tuple[str, str], dict[str, float]] = {}
    for name, value in results.get("precision", {}).items():
        share, method, seed = name.split("/")
        by.setdefault((share, method), {})[seed] = value
    rows, verdicts = [], []
    for (share, method), values in sorted(by.items(), key=lambda item: (float(item[0][0]), item[0][1])):
        ours = by.get((share, "DR.CPO"), {})
        gains = [ours[seed] - value for seed, value in values.items() if seed in ours]
        gain = mean_and_interval(gains, 3) if method != "DR.CPO" and gains else ""
        rows.append(
            [method, f"{100 * float(share):.0f} %", str(len(values)), mean_and_interval(list(values.values()), 3), gain]
        )
        if method != "DR.CPO" and len(gains) >= 5:
            verdicts.append(
                f"- {100 * float(share):.0f} % of the frames: DR.CPO {_verdict(gains)} {OTHERS.get(method, method)}."
            )
    header = ["augmentation", "frames with labels", "seeds", "average precision", "DR.CPO minus it"]
    stored = len(results.get("precision", {}))
    left = (
        f"{stored} of the study's 60 runs are stored (five seeds, 10, 30 and 100 % of the frames, four augmentations)."
    )
    if stored < 60:
        left += " With fewer than five seeds nothing is claimed; `python benchmarks/point_cloud.py precision` continues the study."
    return ["## Average precision", PRECISION, markdown_table(header, rows), "\n".join(verdicts), left]


def _verdict(gains: list[float]) -> str:
    mean, half = statistics.fmean(gains), half_width(gains)
    if abs(mean) <= half:
        return "does not differ significantly from"
    return "is better than" if mean > 0 else "is **worse** than"
