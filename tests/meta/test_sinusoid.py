"""Sinusoids: their ranges, and the same tasks from the same seed."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_plugins.meta import Sinusoid, TaskSet


def tasks(count=200, seed=0, **settings):
    return Sinusoid(**settings).sample(count, torch.Generator().manual_seed(seed))


def fitted(x, y):
    """Amplitude and phase of every task, by least squares on sine and cosine, and the misfit."""
    x, y = x.double(), y.double()
    basis = torch.cat([x.sin(), x.cos()], dim=2)
    solution = torch.linalg.lstsq(basis, y).solution
    misfit = (basis @ solution - y).abs().amax()
    a, b = solution[:, 0, 0], solution[:, 1, 0]
    return torch.hypot(a, b), torch.atan2(-b, a), misfit


@given(shots=st.integers(1, 6), queries=st.integers(1, 6), count=st.integers(1, 9), seed=st.integers(0, 2**40))
def test_shapes_ranges_and_seed(shots, queries, count, seed):
    (support_x, support_y), (query_x, query_y) = drawn = tasks(count, seed, shots=shots, queries=queries)
    assert support_x.shape == support_y.shape == (count, shots, 1)
    assert query_x.shape == query_y.shape == (count, queries, 1)
    assert torch.cat([support_x, query_x], dim=1).abs().amax() <= 5
    assert torch.cat([support_y, query_y], dim=1).abs().amax() <= 5
    torch.testing.assert_close(tasks(count, seed, shots=shots, queries=queries), drawn, rtol=0, atol=0)


def test_support_and_query_lie_on_one_sinusoid_of_the_published_distribution():
    (support_x, support_y), (query_x, query_y) = tasks(3000, shots=10, queries=10)
    amplitude, phase, misfit = fitted(torch.cat([support_x, query_x], dim=1), torch.cat([support_y, query_y], dim=1))
    assert misfit < 1e-5
    # Uniform: the mean within four standard errors, and bounds that are nearly reached.
    for values, low, high in ((amplitude, 0.1, 5.0), (phase, 0.0, math.pi)):
        assert low - 1e-4 <= values.min() < low + 0.02
        assert high - 0.02 < values.max() <= high + 1e-4
        assert abs(float(values.mean()) - (low + high) / 2) < 4 * (high - low) / math.sqrt(12 * 3000)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shots": 0}, ValueError, "`shots` must be at least 1, got 0"),
        ({"queries": 1.0}, TypeError, r"`queries` must be an int .*; did you mean 1\?"),
    ],
)
def test_mistakes(arguments, error, message):
    with pytest.raises(error, match=message):
        Sinusoid(**arguments)


def test_a_task_set_without_sample_says_so():
    class Empty(TaskSet):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty must define `sample\(tasks, generator\)`"):
        Empty().sample(1, torch.Generator())
