"""The page of the measurements of point clouds, from what `point_cloud.py` stored."""

from typing import Any

from _report import markdown_table, mean_and_interval

# ruff: noqa: E501 - the page's own lines
INTRODUCTION = """# Whole-body augmentation of point clouds

`benchmarks/point_cloud.py` makes this page from the measurements stored beside it. Everything is generated: nothing here
says anything about KITTI or another recorded data set. Times are processor time of one thread, on a machine that others
were using."""

RESCAN = """A cuboid of a car's size is put into a frame of walls and poles, and compared with a new scan of the same scene
with that cuboid in it (64 beams, 2,048 azimuths, no noise). *IoU of beams* counts the beams that return from the object.
*IoU of the frame* counts, on all beams that return from the object in either, what is seen there, so a point of the frame
that is hidden and still there counts as wrong. *Points* is the object's number of points over that of the new scan. The
bank holds the same cuboid seen from 5 to 25 m. Ground-truth sampling pastes an object that was seen at the very same
place: its own points are right but for ground and range margins of its box, and what it ought to hide stays."""


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
    if "sphere" in results:
        rows = [
            [r["by"], f"{r['distance']:g}", f"{r['factor']:g}", f"{r['recall']:.4f}", f"{r['precision']:.3f}"]
            for r in results["sphere"]["rows"]
        ]
        header = ["by", "distance", "radius factor", "recall", "precision"]
        parts += [
            "## Hidden points of a sphere",
            "20,000 points on a sphere of radius 1.",
            markdown_table(header, rows),
        ]
    if "time" in results:
        rows = [
            [name, str(r["points"]), str(r["boxes"]), f"{r['ms']:.0f}", f"{r['fastest_ms']:.0f}"]
            for name, r in results["time"].items()
        ]
        parts += ["## Time of a frame", markdown_table(["case", "points", "boxes", "median ms", "fastest ms"], rows)]
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
        lines.append(f"- Largest resident size along the frames: {sizes}.")
    if "overlaps" in results:
        found = results["overlaps"]
        lines.append(f"- Overlaps among {found['placed']} placed objects and the frames' own: {found['overlaps']}.")
    if "frame" in results:
        found = results["frame"]
        lines.append(
            f"- A pass of the whole frame ({found['points']} points, all of which were seen) would remove "
            f"{100 * found['hull']:.0f} % by the hull (radius factor 1,000)."
        )
    return ["## Bank, memory, placement", "\n".join(lines)] if lines else []


def _precision(results: dict[str, Any]) -> list[str]:
    runs = results.get("precision", {})
    if not runs:
        text = (
            "The study of average precision (five seeds, 10, 30 and 100 % of the frames) has not been run to its end, so "
            "**it is not shown that this augmentation beats ground-truth sampling**. "
            "`python benchmarks/point_cloud.py precision` runs it and goes on where it was stopped."
        )
        return ["## Average precision", text]
    keys = sorted({tuple(name.split("/")[:2]) for name in runs}, key=lambda key: (float(key[0]), key[1]))
    rows = []
    for share, method in keys:
        values = [value for name, value in runs.items() if name.startswith(f"{share}/{method}/")]
        rows.append([method, share, str(len(values)), mean_and_interval(values, 3)])
    header = ["augmentation", "share of the frames", "seeds", "average precision"]
    return ["## Average precision", markdown_table(header, rows)]
