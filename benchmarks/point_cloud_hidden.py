"""Hidden points of a sphere and a car, compared with geometry and with Open3D's operator on the same points.

Open3D is not a dependency. To add its rows, in an environment with this package:

    pip install open3d        # and, where it is missing, the system's libusb-1.0
    python benchmarks/point_cloud.py hidden
"""

import numpy as np
import torch
from torch import Tensor

from lightning_plugins.functional import hidden_points

ORIGIN = (0.0, 0.0, 0.0)


def run() -> dict[str, object]:
    open3d = _open3d()
    sphere, car = list(_sphere(open3d)), list(_car(open3d))
    for row in (*sphere, *car):
        print(row, flush=True)
    return {"sphere": sphere, "car": car, "open3d": None if open3d is None else open3d.__version__}


def _open3d():
    try:
        import open3d
    except ImportError as error:  # also if a system library is missing, which the message then names
        print(f"without Open3D: {error}")
        return None
    return open3d


def _visible(points: Tensor, viewpoint: tuple[float, float, float], factor: float, open3d) -> dict[str, Tensor]:
    """By ours, and by Open3D with the same radius."""
    found = {"ours": ~hidden_points(points, viewpoint, factor)}
    if open3d is not None:
        radius = factor * float((points - torch.tensor(viewpoint)).norm(dim=1).max())
        cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points.numpy()))
        found["Open3D"] = torch.zeros(len(points), dtype=torch.bool)
        found["Open3D"][torch.tensor(cloud.hidden_point_removal(list(viewpoint), radius)[1])] = True
    return found


def _sphere(open3d):
    """Recall and precision of the visible points, by distance and radius factor."""
    points = torch.from_numpy(np.random.default_rng(0).normal(size=(20_000, 3)))
    points /= points.norm(dim=1, keepdim=True)
    for distance in (2.0, 5.0, 20.0):
        truth = points[:, 0] > 1 / distance
        for factor in (10.0, 100.0, 1000.0):
            found = _visible(points, (distance, 0.0, 0.0), factor, open3d)
            for name, visible in found.items():
                hits = float((visible & truth).sum())
                yield {
                    "by": name,
                    "distance": distance,
                    "factor": factor,
                    "recall": hits / float(truth.sum()),
                    "precision": hits / float(visible.sum()),
                    "agree": float((visible == found["ours"]).double().mean()),
                }


def _car(open3d):
    """Points kept of a car's noisy surface, with the paper's radius, 200 times its horizontal extent."""
    rng = np.random.default_rng(1)
    size, axis = np.array([4.2, 1.8, 1.55]), rng.integers(3, size=5000)
    places = rng.uniform(-0.5, 0.5, (5000, 3))
    places[np.arange(5000), axis] = rng.choice([-0.5, 0.5], 5000)
    cloud = torch.from_numpy(places * size + rng.normal(0, 0.02, (5000, 3)))
    for distance in (5.0, 10.0, 20.0, 40.0, 60.0, 80.0):
        points = cloud + torch.tensor([distance, 0.0, -0.95])
        extent = points[:, :2].amax(dim=0) - points[:, :2].amin(dim=0)
        factor = max(1.0, 200 * float(extent.norm()) / float(points.norm(dim=1).max()))
        found = _visible(points, ORIGIN, factor, open3d)
        yield {
            "distance": distance,
            "kept": {name: int(visible.sum()) for name, visible in found.items()},
            "agree": {name: float((visible == found["ours"]).double().mean()) for name, visible in found.items()},
        }
