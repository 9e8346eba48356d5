"""The decorrelation term equals NumPy's correlations and the off-diagonal part of Barlow Twins."""

import numpy as np
import pytest
import torch

from lightning_plugins.functional import decorrelation
from lightning_plugins.regularizers import Decorrelation
from tests.regularizers.terms import draw, gradient_of


def as_published(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Barlow Twins' code: batch normalisation without affine parameters, then the cross-correlation."""
    one, two = (torch.nn.functional.batch_norm(view, None, None, training=True) for view in (first, second))
    correlation = one.T @ two / len(one)
    return (correlation - torch.diag(torch.diag(correlation))).pow(2).sum()


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (64, 16)], ids=str)
def test_value_and_gradient(shape):
    rows, other = draw(*shape), draw(*shape, seed=1)
    torch.testing.assert_close(Decorrelation(0.3)(rows), 0.3 * as_published(rows, rows))
    torch.testing.assert_close(decorrelation(rows, other), as_published(rows, other))
    torch.testing.assert_close(gradient_of(Decorrelation(), rows), gradient_of(lambda h: as_published(h, h), rows))
    found = gradient_of(lambda h: decorrelation(h, other), rows)
    torch.testing.assert_close(found, gradient_of(lambda h: as_published(h, other), rows))
    correlation = np.corrcoef(rows.numpy(), rowvar=False)
    expected = np.sum((correlation - np.eye(shape[1])) ** 2)
    torch.testing.assert_close(Decorrelation(eps=1e-15)(rows).item(), float(expected))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: Decorrelation(eps=0.0), ValueError, "`eps` must be above 0, got 0.0"),
        (lambda: decorrelation(draw(4, 3), draw(3, 3)), ValueError, r"`other` must have the shape of `embeddings`"),
        (lambda: Decorrelation()(draw(4, 3, 2)), ValueError, r"`embeddings` must have shape \(N, d\)"),
        (lambda: Decorrelation()(draw(0, 3)), ValueError, "`embeddings` must have at least one row, got none"),
        (lambda: Decorrelation()(torch.ones(3, 2).long()), TypeError, "`embeddings` must be a floating tensor"),
        (lambda: Decorrelation()(draw(4, 3), draw(2, 2)), ValueError, "`remembered` must have 3 columns"),
        (lambda: Decorrelation()(draw(4, 3), draw(2)), ValueError, r"`remembered` must have shape \(N, d\)"),
    ],
)
def test_wrong_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()
