"""Metrics of classes, views and spectra equal NumPy's, and over processes and batches the whole."""

from typing import Any

import numpy as np
import pytest
import torch

from lightning_plugins.metrics import AlphaReQ, ClassRank, FeatureStableRank, LabelledLiDAR, LiDAR, NeuralCollapse
from tests._processes import run_on_ranks
from tests.regularizers.terms import draw

LABELS = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 1, 2, 0, 2])


def rows_of(labels: torch.Tensor = LABELS, dim: int = 4) -> torch.Tensor:
    return draw(3, dim, seed=7)[labels] * 2 + draw(len(labels), dim)


def scatter(rows: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    means = np.stack([rows[labels == c].mean(0) for c in range(3)])
    within = sum(np.outer(x - means[c], x - means[c]) for x, c in zip(rows, labels, strict=True)) / len(rows)
    return within, np.cov(means, rowvar=False, bias=True)


def effective(values: np.ndarray) -> float:
    p = values[values > 1e-12 * values.max()] / values.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def test_neural_collapse_and_class_ranks():
    rows = rows_of()
    within, between = scatter(rows.numpy(), LABELS.numpy())
    expected = np.trace(within @ np.linalg.pinv(between, rcond=1e-9)) / 3
    torch.testing.assert_close(NeuralCollapse(4, 3)(rows, LABELS).item(), float(expected))
    for part, matrix in (("within", within), ("between", between)):
        found = ClassRank(4, 3, part=part)(rows, LABELS).item()
        torch.testing.assert_close(found, effective(np.linalg.eigvalsh(matrix)))


def test_collapsed_classes():
    rows = draw(3, 4, seed=7)[LABELS]
    assert NeuralCollapse(4, 3)(rows, LABELS) < 1e-12
    torch.testing.assert_close(ClassRank(4, 3)(rows, LABELS).item(), 1.0)


def test_a_class_without_rows_does_not_count():
    with_more = NeuralCollapse(4, 9)
    torch.testing.assert_close(with_more(rows_of(), LABELS), NeuralCollapse(4, 3)(rows_of(), LABELS))


def lidar(within: np.ndarray, between: np.ndarray, delta: float = 1e-4) -> float:
    values, vectors = np.linalg.eigh(within + delta * np.eye(len(within)))
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    return effective(np.linalg.eigvalsh(root @ between @ root))


def test_lidar_of_views_and_of_labels():
    views = draw(20, 1, 5, seed=3) * torch.tensor([3.0, 2.0, 1.0, 0.1, 0.0]) + 0.3 * draw(20, 4, 5)
    x = views.numpy()
    apart = (x - x.mean(1, keepdims=True)).reshape(-1, 5)
    expected = lidar(apart.T @ apart / len(apart), np.cov(x.mean(1), rowvar=False, bias=True))
    metric = LiDAR(5)
    metric.update(views[:7])
    metric.update(views[7:])
    torch.testing.assert_close(metric.compute().item(), expected)
    rows = rows_of()
    found = LabelledLiDAR(4, 3)(rows, LABELS).item()
    torch.testing.assert_close(found, lidar(*scatter(rows.numpy(), LABELS.numpy())))


def test_alpha_req():
    rows = draw(400, 60) * torch.arange(1.0, 61).pow(-0.75) + 5
    metric = AlphaReQ(60)
    metric.update(rows[:150])
    metric.update(rows[150:])
    values = np.linalg.eigvalsh(np.cov(rows.numpy(), rowvar=False))[::-1]
    j = np.arange(11, 51)
    torch.testing.assert_close(metric.compute().item(), float(-np.polyfit(np.log(j), np.log(values[10:50]), 1)[0]))
    assert AlphaReQ(3)(torch.ones(5, 3)).isnan()  # no variance at all


def test_feature_stable_rank():
    rows = draw(20, 6) + 1
    s = np.linalg.svd(rows.numpy(), compute_uv=False)
    torch.testing.assert_close(FeatureStableRank(6)(rows).item(), float(np.sum(s**2) / s[0] ** 2))
    assert FeatureStableRank(6)(torch.zeros(4, 6)) == 1


def on_rank(rank: int) -> list[float]:
    mine = slice(0, 5) if rank == 0 else slice(5, 12)
    rows, labels = rows_of()[mine], LABELS[mine]
    values = []
    for metric in (NeuralCollapse(4, 3), ClassRank(4, 3), LabelledLiDAR(4, 3)):
        metric.update(rows, labels)
        values.append(metric.compute().item())
    alpha, views = AlphaReQ(4), LiDAR(4)
    alpha.update(rows)
    views.update(draw(12, 3, 4)[mine])
    return [*values, alpha.compute().item(), views.compute().item()]


@pytest.mark.distributed
def test_unequal_processes_equal_one(tmp_path: Any):
    rows = rows_of()
    expected = [m(rows, LABELS).item() for m in (NeuralCollapse(4, 3), ClassRank(4, 3), LabelledLiDAR(4, 3))]
    expected += [AlphaReQ(4)(rows).item(), LiDAR(4)(draw(12, 3, 4)).item()]
    for found in run_on_ranks(on_rank, 2, tmp_path):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "metric", [NeuralCollapse(4, 3), ClassRank(4, 3), LabelledLiDAR(4, 3)], ids=lambda metric: type(metric).__name__
)
def test_rows_that_are_not_finite_are_seen(metric: Any):
    rows = rows_of()
    rows[3, 1] = torch.nan
    assert metric(rows, LABELS).isnan()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: NeuralCollapse(4, 0), ValueError, "`num_classes` must be at least 1, got 0"),
        (lambda: ClassRank(4, 3, part="betwen"), ValueError, r"got 'betwen'; did you mean 'between'\?"),
        (lambda: NeuralCollapse(4, 3)(rows_of(), LABELS.double()), TypeError, "`labels` must be an integer tensor"),
        (
            lambda: NeuralCollapse(4, 3)(rows_of(), LABELS[:3]),
            ValueError,
            "`labels` must have one number for each of 12",
        ),
        (lambda: NeuralCollapse(5, 3)(rows_of(), LABELS), ValueError, r"`embeddings` must have shape \(N, 5\)"),
        (lambda: LiDAR(4, delta=0), ValueError, "`delta` must be above 0, got 0"),
        (lambda: LiDAR(4)(draw(5, 4)), ValueError, "with two views or more of each sample"),
        (lambda: LiDAR(4)(torch.ones(5, 2, 4).long()), TypeError, "`views` must be a floating tensor"),
        (lambda: AlphaReQ(20, first=9, last=5), ValueError, "`last` must be after `first`=9"),
        (lambda: AlphaReQ(20, last=30), ValueError, "at most `num_features`=20, got 30"),
    ],
)
def test_wrong_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()
