"""The Rényi term equals NumPy's spectrum and FroSSL's logarithm of the squared Frobenius norm."""

import numpy as np
import pytest
import torch

from lightning_plugins.regularizers import RenyiEntropy
from tests.regularizers.terms import draw, gradient_of


def as_published(rows: torch.Tensor) -> torch.Tensor:
    """FroSSL's multi-view code for one view: unit rows, the smaller Gram matrix, log of its squared norm."""
    z = torch.nn.functional.normalize(rows, dim=-1)
    gram = z.T @ z if len(z) > z.shape[1] else z @ z.T
    return torch.log(torch.linalg.matrix_norm(gram / len(z)) ** 2)


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (64, 16)], ids=str)
@pytest.mark.parametrize("centred", [False, True])
def test_value_and_gradient(shape, centred):
    rows, term = draw(*shape), RenyiEntropy(0.3, centred=centred)
    h = rows.numpy() - rows.numpy().mean(0) * centred
    z = h / np.linalg.norm(h, axis=1, keepdims=True)
    p = np.linalg.eigvalsh(z.T @ z / len(z))
    torch.testing.assert_close(term(rows).item(), float(0.3 * np.log(np.sum(p**2))))
    expected = gradient_of(lambda h: 0.3 * as_published(h - h.mean(0) * centred), rows)
    torch.testing.assert_close(gradient_of(term, rows), expected)


def test_it_is_lowest_for_orthogonal_rows_and_highest_for_equal_ones():
    torch.testing.assert_close(RenyiEntropy()(torch.eye(4)), -torch.tensor(4.0).log())
    torch.testing.assert_close(RenyiEntropy()(torch.ones(4, 4)), torch.tensor(0.0))


def test_an_integer_for_a_switch_is_named():
    with pytest.raises(TypeError, match="`centred` must be True or False, got 1"):
        RenyiEntropy(centred=1)
