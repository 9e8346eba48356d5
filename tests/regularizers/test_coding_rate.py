"""The coding rate equals NumPy's determinant and the formula of the published code."""

import math

import numpy as np
import pytest
import torch

from lightning_plugins.functional import coding_rate
from lightning_plugins.regularizers import CodingRate
from tests.regularizers.terms import draw, gradient_of


def reference(h: np.ndarray, distortion: float) -> float:
    z = h / np.linalg.norm(h, axis=1, keepdims=True)
    n, d = z.shape
    return 0.5 * float(np.linalg.slogdet(np.eye(d) + d / (distortion * n) * z.T @ z)[1])


def as_published(rows: torch.Tensor, distortion: float) -> torch.Tensor:
    """MCR²'s code: samples in columns, ``logdet(I + p / (m * eps) * W @ W.T) / 2``."""
    w = torch.nn.functional.normalize(rows).T
    p, m = w.shape
    return torch.logdet(torch.eye(p, dtype=w.dtype) + p / (m * distortion) * w @ w.T) / 2


@pytest.mark.parametrize("distortion", [0.01, 0.5, 2.0])
@pytest.mark.parametrize("shape", [(1, 5), (3, 7), (7, 3), (64, 16)], ids=str)
def test_value_and_gradient(shape, distortion):
    rows, term = draw(*shape), CodingRate(0.3, distortion=distortion)
    torch.testing.assert_close(term(rows).item(), -0.3 * reference(rows.numpy(), distortion))
    expected = gradient_of(lambda h: -0.3 * as_published(h, distortion), rows)
    torch.testing.assert_close(gradient_of(term, rows), expected)


def test_bounds_are_reached():
    torch.testing.assert_close(coding_rate(torch.eye(3)), torch.tensor(1.5 * math.log(1 + 1 / 0.5)))
    assert coding_rate(torch.ones(8, 3)) < coding_rate(draw(8, 3, dtype=torch.float32))


def test_rows_as_they_are_count_with_their_lengths():
    assert coding_rate(2 * torch.eye(3), unit_rows=False) > coding_rate(torch.eye(3), unit_rows=False)
    torch.testing.assert_close(coding_rate(2 * torch.eye(3)), coding_rate(torch.eye(3)))


def test_gradient_for_small_distortion_is_that_of_the_log_determinant():
    """Matrix-SSL's uniformity, up to the constant and a factor."""
    rows = draw(32, 4)
    unit = torch.nn.functional.normalize(rows)

    def log_determinant(h):
        z = torch.nn.functional.normalize(h)
        return -torch.logdet(z.T @ z / len(z)) / 2

    torch.testing.assert_close(
        gradient_of(CodingRate(distortion=1e-7), unit), gradient_of(log_determinant, unit), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: CodingRate(distortion=0.0), ValueError, "`distortion` must be above 0, got 0.0"),
        (lambda: CodingRate(distortion="1"), TypeError, "`distortion` must be a number, got '1'"),
        (lambda: coding_rate(torch.ones(3)), ValueError, r"`embeddings` must have shape \(..., N, d\)"),
        (lambda: coding_rate(torch.ones(3, 2), distortion=-1), ValueError, "`distortion` must be above 0, got -1"),
    ],
)
def test_wrong_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()
