"""Reader for the files of KITTI's object detection benchmark; the files are not part of this package."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_plugins._arguments import check_arguments


class KITTIFrames(torch.utils.data.Dataset[dict[str, Any]]):
    """Frames from ``velodyne/*.bin``, ``label_2/*.txt`` and ``calib/*.txt``.

    A frame is a dictionary of ``points`` (n, 4) float32, ``boxes`` (m, 7) float32 in the sensor's frame, ``labels``
    (m names) and ``index``, the number in the file's name.

    Args:
        root: The folder with these subfolders, such as ``training``.
        names: File names without extension; by default all of ``velodyne``, in order.

    Raises:
        FileNotFoundError: If the folder has no frame in that layout.
    """

    def __init__(self, root: str | os.PathLike[str], names: list[str] | None = None) -> None:
        check_arguments(KITTIFrames.__init__, locals())
        self.root = Path(root)
        self.names = sorted(path.stem for path in self.root.glob("velodyne/*.bin")) if names is None else list(names)
        if not self.names:
            raise FileNotFoundError(
                f"`root` must have velodyne/*.bin beside label_2 and calib, got {self.root}; did you mean its folder "
                "`training`?"
            )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> dict[str, Any]:
        name = self.names[number]
        boxes, labels = read_kitti_labels(self.root / "label_2" / f"{name}.txt", self.root / "calib" / f"{name}.txt")
        points = read_kitti_points(self.root / "velodyne" / f"{name}.bin")
        return {"points": points, "boxes": boxes, "labels": labels, "index": int(name) if name.isdigit() else number}


def _check_file(name: str, path: str | os.PathLike[str]) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"`{name}` must be a file, got {os.fspath(path)!r}, which is none")


def read_kitti_points(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a scan: little-endian float32, four to a point.

    Args:
        path: A ``.bin`` file.

    Returns:
        x, y, z and reflectance, shape ``(n, 4)``.

    Raises:
        ValueError: If the file size is not a whole number of points.
    """
    check_arguments(read_kitti_points, locals())
    _check_file("path", path)
    values = np.fromfile(path, dtype="<f4")
    if len(values) % 4 or Path(path).stat().st_size % 16:
        raise ValueError(f"`path` must hold points of four float32, got {Path(path).stat().st_size} bytes in {path}")
    return values.reshape(-1, 4).astype(np.float32)


def read_kitti_labels(
    path: str | os.PathLike[str], calibration: str | os.PathLike[str]
) -> tuple[np.ndarray, list[str]]:
    """Read labels and transform their boxes from the camera's frame, y down, to the sensor's, z up.

    Args:
        path: A file of ``label_2``; ``DontCare`` regions are ignored.
        calibration: The frame's file of ``calib``, of which ``R0_rect`` and ``Tr_velo_to_cam`` are used.

    Returns:
        Boxes ``x, y, z, dx, dy, dz, yaw`` of shape ``(m, 7)``, and the names of their classes.

    Raises:
        ValueError: If a line has too few fields, or the calibration lacks a matrix.
    """
    check_arguments(read_kitti_labels, locals())
    matrices: dict[str, np.ndarray] = {}
    _check_file("path", path)
    _check_file("calibration", calibration)
    for line in Path(calibration).read_text(encoding="utf-8").splitlines():
        name, _, numbers = line.partition(":")
        matrices[name.strip()] = np.array(numbers.split(), dtype=float)
    if missing := {"R0_rect", "Tr_velo_to_cam"} - matrices.keys():
        raise ValueError(
            f"`calibration` must have the matrices R0_rect and Tr_velo_to_cam, {calibration} lacks {missing}"
        )
    rectify, move = matrices["R0_rect"].reshape(3, 3), matrices["Tr_velo_to_cam"].reshape(3, 4)
    boxes, labels = [], []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split()
        if not fields or fields[0] == "DontCare":
            continue
        if len(fields) < 15:
            raise ValueError(f"`path` must have 15 fields in a line, got {len(fields)} in line {number} of {path}")
        height, width, length, x, y, z, turn = (float(value) for value in fields[8:15])
        centre = np.linalg.solve(rectify @ move[:, :3], np.array([x, y, z]) - rectify @ move[:, 3])
        yaw = (-turn - np.pi / 2 + np.pi) % (2 * np.pi) - np.pi
        boxes.append([centre[0], centre[1], centre[2] + height / 2, length, width, height, yaw])
        labels.append(fields[0])
    return np.array(boxes, dtype=np.float32).reshape(-1, 7), labels
