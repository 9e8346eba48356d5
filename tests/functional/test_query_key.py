"""Norms of products of query and key maps equal NumPy's, exact and followed."""

import numpy as np
import pytest
import torch

from lightning_plugins.functional.query_key import query_key_norms
from tests.regularizers.terms import draw


@pytest.mark.parametrize("shape", [(2, 3, 8), (3, 5, 5), (1, 6, 4)], ids=str)
def test_exact_without_a_start(shape):
    query, key = draw(*shape), draw(*shape, seed=1)
    expected = [np.linalg.norm(q.T @ k, 2) for q, k in zip(query.numpy(), key.numpy(), strict=True)]
    torch.testing.assert_close(query_key_norms(query, key).norms.numpy(), np.array(expected))


def test_followed_while_the_maps_change():
    query, key = draw(2, 8, 32), draw(2, 8, 32, seed=1)
    start = None
    for step in range(30):
        query = query + 0.01 * draw(2, 8, 32, seed=2 + step)
        norms, start = query_key_norms(query, key, start)
    exact = query_key_norms(query, key).norms
    assert (norms <= exact * (1 + 1e-9)).all()
    torch.testing.assert_close(norms, exact, rtol=1e-2, atol=0)


@pytest.mark.parametrize("query", [torch.zeros(2, 3, 4), torch.ones(2, 3, 4)], ids=["zeros", "rank one"])
def test_degenerate_maps(query):
    found = query_key_norms(query, query)
    again = query_key_norms(query, query, found.start)
    assert found.start.isfinite().all()
    torch.testing.assert_close(again.norms, found.norms)


def test_a_head_that_is_not_finite_spoils_no_other():
    query = draw(2, 3, 4)
    query[1, 0, 0] = torch.inf
    norms = query_key_norms(query, draw(2, 3, 4, seed=1)).norms
    assert norms[0].isfinite()
    assert norms[1].isnan()


def test_unequal_shapes_are_named():
    with pytest.raises(ValueError, match=r"`query` and `key` must have one shape \(heads, h, d\)"):
        query_key_norms(draw(2, 3, 4), draw(1, 3, 4))
