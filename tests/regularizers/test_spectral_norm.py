"""The spectral norm equals NumPy's, its gradient the outer product of the leading singular vectors."""

import numpy as np
import pytest
import torch

from lightning_plugins.functional import spectral_norm
from lightning_plugins.regularizers import SpectralNorm
from tests.regularizers.terms import draw, gradient_of


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (4, 4)], ids=str)
def test_value_and_gradient(shape, power):
    weight, term = draw(*shape), SpectralNorm(0.3, power=power)
    u, s, v = np.linalg.svd(weight.numpy(), full_matrices=False)
    torch.testing.assert_close(term(weight).item(), float(0.3 * s[0] ** power))
    gradient = 0.3 * power * s[0] ** (power - 1) * np.outer(u[:, 0], v[0])
    torch.testing.assert_close(gradient_of(term, weight).numpy(), gradient)
    torch.testing.assert_close(term.value_and_gradient(weight)[1].numpy(), gradient)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_it_scales_without_overflow(scale):
    weight = draw(4, 3, dtype=torch.float32)
    torch.testing.assert_close(spectral_norm(scale * weight) / scale, spectral_norm(weight))


def test_wrong_power_is_named():
    with pytest.raises(ValueError, match="`power` must be 1 or 2, got 3"):
        SpectralNorm(power=3)
