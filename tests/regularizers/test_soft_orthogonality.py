"""Soft orthogonality equals NumPy's norm, and the published formula up to its constant."""

import numpy as np
import pytest
import torch

from lightning_plugins.functional import soft_orthogonality
from lightning_plugins.regularizers import SoftOrthogonality
from tests.regularizers.terms import draw, gradient_of


def as_published(weight: torch.Tensor) -> torch.Tensor:
    return (weight.T @ weight - torch.eye(weight.shape[1], dtype=weight.dtype)).square().sum()


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (4, 4)], ids=str)
def test_value_and_gradient(shape):
    weight = draw(*shape)
    s = np.linalg.svd(weight.numpy(), compute_uv=False)
    torch.testing.assert_close(SoftOrthogonality(0.3)(weight).item(), float(0.3 * np.sum((s**2 - 1) ** 2)))
    torch.testing.assert_close(soft_orthogonality(weight) + max(shape[1] - shape[0], 0), as_published(weight))
    torch.testing.assert_close(gradient_of(SoftOrthogonality(), weight), gradient_of(as_published, weight))


@pytest.mark.parametrize("shape", [(3, 7), (7, 3)], ids=str)
def test_it_is_zero_for_orthonormal_rows_or_columns(shape):
    basis = torch.linalg.qr(draw(7, 3))[0]
    weight = basis if shape[0] == 7 else basis.T
    assert soft_orthogonality(weight) < 1e-20
    assert SoftOrthogonality().value_and_gradient(weight)[1].abs().max() < 1e-12


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="`weight` must be a number"):
        SoftOrthogonality(None)
    with pytest.raises(ValueError, match=r"`weight` must have shape \(..., m, n\)"):
        soft_orthogonality(torch.ones(3))
