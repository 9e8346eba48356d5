"""The spread-out term equals sums over pairs in NumPy, on both roads, and its published formula."""

import numpy as np
import pytest
import torch

from lightning_plugins.regularizers import SpreadOut
from tests.regularizers.terms import draw, gradient_of


def as_published(rows: torch.Tensor) -> torch.Tensor:
    """GOR over all pairs of different rows."""
    z = torch.nn.functional.normalize(rows)
    products = (z @ z.T)[~torch.eye(len(z), dtype=torch.bool)]
    return products.mean() ** 2 + torch.relu(products.square().mean() - 1 / z.shape[1])


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (64, 16)], ids=str)
def test_value_and_gradient(shape):
    rows = draw(*shape) + 0.5
    z = rows.numpy() / np.linalg.norm(rows.numpy(), axis=1, keepdims=True)
    pairs = [z[i] @ z[j] for i in range(len(z)) for j in range(len(z)) if i != j]
    expected = np.mean(pairs) ** 2 + max(np.mean(np.square(pairs)) - 1 / shape[1], 0)
    torch.testing.assert_close(SpreadOut(0.3)(rows).item(), float(0.3 * expected))
    torch.testing.assert_close(gradient_of(SpreadOut(), rows), gradient_of(as_published, rows))


def test_rows_that_are_spread_out_have_no_term():
    torch.testing.assert_close(
        SpreadOut()(torch.cat([torch.eye(4), -torch.eye(4)])), torch.tensor(0.0204), rtol=0, atol=1e-3
    )
    assert SpreadOut()(torch.ones(5, 4)) > 1.7
    assert SpreadOut()(draw(1, 4)) == 0
