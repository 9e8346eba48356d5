"""The variance and covariance terms equal NumPy's and the formulas of VICReg's code."""

import numpy as np
import pytest
import torch

from lightning_plugins.functional import covariance_penalty, variance_hinge
from lightning_plugins.regularizers import VICRegCovariance, VICRegVariance
from tests.regularizers.terms import draw, gradient_of


def published_variance(x: torch.Tensor) -> torch.Tensor:
    x = x - x.mean(dim=0)
    return torch.mean(torch.relu(1 - torch.sqrt(x.var(dim=0) + 0.0001)))


def published_covariance(x: torch.Tensor) -> torch.Tensor:
    x = x - x.mean(dim=0)
    covariance = (x.T @ x) / (len(x) - 1)
    return (covariance - torch.diag(torch.diag(covariance))).pow(2).sum().div(x.shape[1])


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (64, 16)], ids=str)
def test_values_and_gradients(shape):
    rows = 0.5 * draw(*shape)
    covariance = np.cov(rows.numpy(), rowvar=False)
    std = np.sqrt(np.diag(covariance) + 1e-4)
    torch.testing.assert_close(VICRegVariance(25)(rows).item(), float(25 * np.maximum(1 - std, 0).mean()))
    off = covariance - np.diag(np.diag(covariance))
    torch.testing.assert_close(VICRegCovariance(2)(rows).item(), float(2 * np.sum(off**2) / shape[1]))
    torch.testing.assert_close(gradient_of(VICRegVariance(), rows), gradient_of(published_variance, rows))
    torch.testing.assert_close(gradient_of(VICRegCovariance(), rows), gradient_of(published_covariance, rows))


def test_a_single_row_has_neither_variance_nor_covariance():
    row = draw(1, 4)
    torch.testing.assert_close(variance_hinge(row), torch.tensor(0.99, dtype=torch.float64))
    torch.testing.assert_close(covariance_penalty(row), torch.tensor(0.0, dtype=torch.float64))


def test_a_small_covariance_beside_large_variances_is_kept():
    rows = torch.tensor([[1e3, 1.0], [-1e3, 1.0], [1e3, -1.0], [-1e3, -1.0]])
    rows[0, 1] += 1e-3
    exact = covariance_penalty(rows.double())
    torch.testing.assert_close(covariance_penalty(rows).double(), exact, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: VICRegVariance(target=0), ValueError, "`target` must be above 0, got 0"),
        (lambda: VICRegVariance(eps=-1e-4), ValueError, "`eps` must be above 0, got -0.0001"),
        (lambda: VICRegVariance("25"), TypeError, "`weight` must be a number, got '25'"),
        (lambda: VICRegCovariance(scope="globl"), ValueError, r"got 'globl'; did you mean 'global'\?"),
    ],
)
def test_wrong_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()
