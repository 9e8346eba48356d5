"""The functions of terms of embeddings, mutual information, distillation and point clouds, for `numerics`."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gpu_parts.case import Case, at_least_float, matrix, rows
from lightning_plugins import functional

# Pure Python functions of numbers, which do not run on a device.
ON_THE_HOST = (
    "RangeGrid",
    "binary_symmetric_channel_crossover",
    "binary_symmetric_channel_information",
    "infonce_ceiling",
)


def of_embeddings() -> dict[str, Case]:
    """Terms, of one batch of rows or of one weight."""
    f = functional
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "coding_rate": f.coding_rate,
        "covariance_penalty": f.covariance_penalty,
        "decorrelation": f.decorrelation,
        "epps_pulley": lambda z: _epps_pulley(at_least_float(z)),
        "pool_embeddings": lambda z: f.pool_embeddings(z.reshape(len(z), 4, -1), layout="NLC"),
        "spread_out": f.spread_out,
        "variance_hinge": lambda z: f.variance_hinge(z, target=1.5),
    }
    found = {name: Case(name, rows(96, 64), call) for name, call in calls.items()}
    for name in ("soft_orthogonality", "spectral_norm"):
        found[name] = Case(name, matrix(96, 64), getattr(f, name))
    # Devices of another kind have other random numbers; the length of the directions is the same on all.
    lengths = lambda z: f.random_directions(64, 16, seed=3, like=z).norm(dim=0)  # noqa: E731
    return found | {"random_directions": Case("random_directions", rows(96, 64), lengths, smooth=False)}


def of_distillation() -> dict[str, Case]:
    """Errors of a student close to its teacher."""

    def pair() -> tuple[Tensor, Tensor]:
        (teacher,) = rows(96, 16)()
        return teacher + 0.3 * torch.randn_like(teacher), teacher

    names = ("cosine_error", "feature_error", "soft_target_divergence")
    return {name: Case(name, pair, lambda s, t, name=name: getattr(functional, name)(s, t.detach())) for name in names}


def of_information() -> dict[str, Case]:
    """Bounds from scores, and information from class probabilities."""
    f = functional

    def scores() -> tuple[Tensor]:
        return (torch.randn(48, 48, dtype=torch.float64) + 3 * torch.eye(48, dtype=torch.float64),)

    def posteriors() -> tuple[Tensor, ...]:
        of_x, of_y = (3 * torch.randn(64, 10, dtype=torch.float64) for _ in range(2))
        return of_x, of_y

    def of_classes(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        def call(x: Tensor, y: Tensor) -> Tensor:
            x, y = (at_least_float(one).log_softmax(1) for one in (x, y))
            found: Tensor = getattr(f, name)(x, y, torch.full((10,), 0.1, device=x.device, dtype=x.dtype))
            return found

        return call

    def of_pairs(z: Tensor) -> Tensor:
        z = at_least_float(z)
        # Sums, not a product, which is the caller's and may be in TF32.
        pairs = f.pair_scores(z[:, :32], z[:, 32:], lambda x, y: (x[:, None] * y).sum(-1) / 8, num_groups=4)
        return torch.tensor(f.bound_from_pairs(pairs).value)

    def covariance(z: Tensor) -> Tensor:
        z = at_least_float(z)[:, :8]
        return f.gaussian_information(z.mT @ z / len(z), 4)

    bounds = ("donsker_varadhan_bound", "infonce_bound", "js_bound", "nwj_bound", "smile_bound")
    found = {name: Case(name, scores, getattr(f, name)) for name in bounds}
    found |= {name: Case(name, posteriors, of_classes(name)) for name in CLASS_POSTERIORS}
    found["mine_loss"] = Case("mine_loss", scores, lambda s: f.mine_loss(s)[0])
    found["class_entropy"] = Case(
        "class_entropy", posteriors, lambda x, _: f.class_entropy(x.softmax(1).mean(0)), smooth=False
    )
    found["gaussian_information"] = Case("gaussian_information", rows(96, 64), covariance, smooth=False)
    for name in ("pair_scores", "bound_from_pairs"):
        found[name] = Case(name, rows(96, 64), of_pairs, smooth=False)
    return found


CLASS_POSTERIORS = ("class_posterior_information", "class_posterior_scores")


def of_clouds() -> dict[str, Case]:
    """Geometry of points, in coordinates that bfloat16 holds exactly."""
    f = functional
    grid = f.RangeGrid(16, 128, -0.5, 0.3)

    def points() -> tuple[Tensor]:
        scattered = torch.randn(512, 3, dtype=torch.float64) * torch.tensor([12.0, 12.0, 1.0], dtype=torch.float64)
        return (scattered.bfloat16().double(),)

    def boxes(p: Tensor) -> Tensor:
        size = torch.tensor([4.0, 2.0, 8.0, 0.5], device=p.device).to(p).expand(32, 4)
        return torch.cat([p[:32], size], 1)

    def cells(p: Tensor) -> tuple[Tensor, Tensor]:
        return torch.arange(len(p), device=p.device) % (grid.rows * grid.columns), p.norm(dim=-1)

    def image(p: Tensor) -> Tensor:
        return f.nearest_ranges(*cells(p), grid)

    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "bev_overlap": lambda p: f.bev_overlap(boxes(p), boxes(p)),
        "close_gaps": lambda p: finite(f.close_gaps(image(p), grid)),
        "ground_height": lambda p: f.ground_height(p * p.new_tensor([1.0, 1.0, 0.02]), p[:8, :2], radius=30.0),
        "hidden_points": lambda p: f.hidden_points(p, [0.0, 0.0, 40.0]),
        "nearest_ranges": lambda p: finite(image(p)),
        "part_occupancy": lambda p: f.part_occupancy(p, p.new_tensor([20.0, 20.0, 4.0]), (2, 2, 2)),
        "points_in_boxes": lambda p: f.points_in_boxes(p, boxes(p)),
        "rotate_z": lambda p: f.rotate_z(p, 0.7),
        "visible_in_range_image": lambda p: f.visible_in_range_image(p, grid),
    }
    return {name: Case(name, points, partial(_in_float, call), smooth=False) for name, call in calls.items()}


def _in_float(call: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    return call(at_least_float(points))


def _epps_pulley(z: Tensor) -> Tensor:
    directions = functional.random_directions(z.shape[1], 16, seed=0, like=torch.zeros(1))
    return functional.epps_pulley(z, directions.to(z))


def finite(x: Tensor) -> Tensor:
    """Empty cells hold infinity, which cannot be subtracted."""
    return x.nan_to_num(posinf=0.0)
