"""SIGReg equals NumPy's integral and the formula of the published code; its directions go by seed and step."""

import numpy as np
import pytest
import torch

from lightning_plugins.functional import epps_pulley, random_directions
from lightning_plugins.regularizers import Quadrature, SIGReg
from tests.regularizers.terms import draw, gradient_of


def as_published(x: torch.Tensor, directions: torch.Tensor, knots: int = 17, extent: float = 5.0) -> torch.Tensor:
    """LeJEPA's listing: the complex empirical characteristic function, over the whole symmetric rule."""
    t = torch.linspace(-extent, extent, knots, dtype=x.dtype)
    gaussian = torch.exp(-0.5 * t**2)
    found = (1j * (x @ directions).unsqueeze(2) * t).exp().mean(0)
    error = (found - gaussian).abs().square() * gaussian
    return (torch.trapezoid(error, t, dim=1) * len(x)).mean()


@pytest.mark.parametrize("rule", [Quadrature(), Quadrature(8, 3.0), Quadrature(2, 1.0)], ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (64, 16)], ids=str)
def test_value_and_gradient(shape, rule):
    rows, term = draw(*shape), SIGReg(0.3, directions=8, quadrature=rule)
    directions = random_directions(shape[1], 8, seed=0, like=rows)
    expected = 0.3 * as_published(rows, directions, rule.knots, rule.extent)
    torch.testing.assert_close(term(rows), expected)
    exact = gradient_of(lambda h: 0.3 * as_published(h, directions, rule.knots, rule.extent), rows)
    torch.testing.assert_close(gradient_of(term, rows), exact)


def test_value_against_numpy():
    rows, directions = draw(30, 4), random_directions(4, 3, seed=1, like=draw(1))
    t = np.linspace(-5, 5, 17)
    p = rows.numpy() @ directions.numpy()
    f = np.exp(1j * p[:, :, None] * t).mean(0)
    error = np.abs(f - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2)
    expected = len(p) * np.sum((error[:, 1:] + error[:, :-1]) / 2 * (t[1] - t[0]), axis=1)
    torch.testing.assert_close(epps_pulley(rows, directions).numpy(), expected)


def test_gaussian_rows_have_the_least():
    gaussian = draw(2000, 5)
    term = SIGReg(directions=32)
    others = {"wide": 2 * gaussian, "moved": gaussian + 1, "collapsed": 0.01 * gaussian, "uniform": gaussian.sign()}
    assert term(gaussian) < 2
    assert all(term(rows) > 10 for rows in others.values())


def test_directions_go_by_seed_and_step():
    rows, term, fixed = draw(6, 4), SIGReg(directions=4), SIGReg(directions=4, resample=False)
    at_first = term(rows)
    torch.testing.assert_close(fixed(rows), at_first, rtol=0, atol=0)
    term.step = fixed.step = 7
    assert term(rows) != at_first
    torch.testing.assert_close(fixed(rows), at_first, rtol=0, atol=0)
    term.step = 0
    torch.testing.assert_close(term(rows), at_first, rtol=0, atol=0)
    assert SIGReg(directions=4, seed=1)(rows) != at_first
    lengths = torch.linalg.vector_norm(random_directions(9, 50, seed=3, like=rows), dim=0)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: SIGReg(directions=0), ValueError, "`directions` must be at least 1, got 0"),
        (lambda: SIGReg(resample="yes"), TypeError, "`resample` must be True or False, got 'yes'"),
        (lambda: SIGReg(seed=-1), ValueError, "`seed` must be at least 0, got -1"),
        (lambda: SIGReg(quadrature=17), TypeError, r"`quadrature` must be a Quadrature, got 17 \(int\)"),
        (lambda: Quadrature(knots=1), ValueError, "`knots` must be at least 2, got 1"),
        (lambda: Quadrature(extent=0.0), ValueError, "`extent` must be above 0, got 0.0"),
        (
            lambda: epps_pulley(draw(4, 3), draw(2, 5)),
            ValueError,
            r"must have shapes \(N, d\) and \(d, M\)",
        ),
        (lambda: epps_pulley(draw(4, 3), draw(3, 5), knots=1), ValueError, "`knots` must be at least 2, got 1"),
    ],
)
def test_wrong_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()
