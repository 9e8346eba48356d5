import math

import pytest
import torch

from lightning_plugins.information import cca_information, ksg_information


def correlated(n, d=1, rho=0.8, seed=0):
    x, noise = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).unbind()
    return x, rho * x + math.sqrt(1 - rho**2) * noise


@pytest.mark.parametrize(("d", "rho"), [(1, 0.0), (1, 0.8), (2, 0.6)])
def test_gaussians_in_closed_form(d, rho):
    x, y = correlated(3000, d, rho)
    truth = -d / 2 * math.log(1 - rho**2)
    assert cca_information(x, y) == pytest.approx(truth, abs=0.05)
    assert ksg_information(x, y) == pytest.approx(truth, abs=0.06)


def test_neighbours_see_what_correlations_do_not():
    x, _ = correlated(2000)
    noise = torch.randn(2000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = x.square() + 0.1 * noise
    assert cca_information(x, y) < 0.02
    assert ksg_information(x, y) > 1.0


def test_cca_does_not_mind_invertible_maps():
    x, y = correlated(300, 3)
    turn = torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert cca_information(x @ turn, 1e4 * y) == pytest.approx(cca_information(x, y), rel=1e-9)


def test_neighbours_by_the_definition():
    x, y = correlated(30, 2)
    k, total = 3, 0.0
    dx, dy = (torch.cdist(part, part, p=math.inf) for part in (x, y))
    both = torch.maximum(dx, dy)
    for i in range(30):
        eps = both[i].sort().values[k]
        near = [int((d[i] < eps).sum()) for d in (dx, dy)]  # itself included, as the 1 in the formula
        total += sum(float(torch.digamma(torch.tensor(n).double())) for n in near)
    known = float(torch.digamma(torch.tensor([k, 30]).double()).sum())
    assert ksg_information(x, y, neighbours=3) == pytest.approx(known - total / 30, rel=1e-9)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ksg_information(torch.zeros(50, 1), torch.zeros(50, 1)),
            ValueError,
            "must not repeat a pair more than",
        ),
        (lambda: ksg_information(*correlated(8)), ValueError, "`x` must have at least 11 pairs, got 8"),
        (lambda: cca_information(*correlated(6, 3)), ValueError, "more rows than x and y have features together, 3"),
        (lambda: cca_information(torch.ones(50, 1), torch.randn(50, 1)), ValueError, "the block of x is not"),
        (lambda: cca_information(torch.full((9, 1), math.nan), torch.ones(9, 1)), ValueError, "`x` must be finite.* 9"),
        (
            lambda: cca_information(torch.ones(9, 1), torch.ones(8, 1)),
            ValueError,
            "`y` must have a row for each of the 9",
        ),
        (lambda: cca_information(torch.ones(9), torch.ones(9)), ValueError, r"`x` must have shape \(N, d\)"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
