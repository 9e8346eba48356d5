"""The one decomposition from the smaller Gram matrix equals NumPy's; scale, marks and cut-off."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_plugins.functional.gram_svd import gram_eigen, gram_svd
from tests.regularizers.terms import draw


@pytest.mark.parametrize("scale", [1e-120, 1.0, 1e120])
@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (4, 4), (2, 5, 3)], ids=str)
def test_values_and_factors(shape, scale):
    matrix = scale * draw(*shape)
    found = gram_svd(matrix)
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)
    torch.testing.assert_close(found.values.flip(-1).numpy() / scale, values / scale)
    wide = matrix.mT if shape[-2] > shape[-1] else matrix
    torch.testing.assert_close(found.left @ (found.values[..., None] * found.right) / scale, wide / scale)
    torch.testing.assert_close(found.left @ found.rows / scale, wide / scale)


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 8), n=st.integers(1, 8), rank=st.integers(0, 4), seed=st.integers(0, 999))
def test_rank_deficient_matrices_have_exact_zeros(m, n, rank, seed):
    matrix = draw(m, rank, seed=seed) @ draw(rank, n, seed=seed + 1)
    found = gram_svd(matrix)
    true = np.linalg.matrix_rank(matrix.numpy()) if rank else 0
    assert int((found.values > 1e-7 * found.values.max()).sum()) == true
    assert found.right.isfinite().all()


def test_what_is_not_finite_is_marked_and_spoils_no_other():
    matrices = draw(2, 3, 4)
    matrices[1, 0, 0] = torch.inf
    found, eigen = gram_svd(matrices), gram_eigen(matrices, vectors=False)
    for poison in (found.poison, eigen.poison):
        assert poison[0] == 0
        assert poison[1].isnan()
    torch.testing.assert_close(found.values[0], gram_svd(matrices[0]).values)
