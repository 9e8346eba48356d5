"""The nuclear norm equals NumPy's, its gradient the polar factor."""

import numpy as np
import pytest
import torch

from lightning_plugins.regularizers import NuclearNorm
from tests.regularizers.terms import draw, gradient_of


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (4, 4)], ids=str)
def test_value_and_gradient(shape):
    weight, term = draw(*shape), NuclearNorm(0.3)
    u, s, v = np.linalg.svd(weight.numpy(), full_matrices=False)
    torch.testing.assert_close(term(weight).item(), float(0.3 * s.sum()))
    torch.testing.assert_close(gradient_of(term, weight).numpy(), 0.3 * u @ v)
    torch.testing.assert_close(term.value_and_gradient(weight)[1].numpy(), 0.3 * u @ v)


def test_wrong_weight_is_named():
    with pytest.raises(ValueError, match="`weight` must be finite, got inf"):
        NuclearNorm(float("inf"))
