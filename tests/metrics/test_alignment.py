import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_plugins.metrics import Alignment
from tests._processes import run_on_ranks


def _views(n, d=3, seed=0):
    return torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).unbind()


@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=st.integers(0, 2**31))
def test_is_the_mean_over_all_pairs_however_they_are_split(sizes, seed):
    first, second = _views(sum(sizes) + 1, seed=seed)
    metric = Alignment()
    for one, other in zip(first.split([*sizes, 1]), second.split([*sizes, 1]), strict=True):
        metric.update(one, other)
    cosine = torch.nn.functional.cosine_similarity(first, second)
    torch.testing.assert_close(metric.compute(), 2 - 2 * cosine.mean())


def test_ends_of_the_range_and_of_precision():
    rows = torch.randn(5, 3)
    torch.testing.assert_close(Alignment()(rows, 7 * rows).item(), 0.0)
    torch.testing.assert_close(Alignment()(rows.bfloat16(), -rows.bfloat16()).item(), 4.0)
    assert Alignment()(rows[:0], rows[:0]).isnan()


def _rank(rank, shards):
    metric = Alignment()
    metric.update(*shards[rank])
    return metric.compute()


@pytest.mark.distributed
def test_two_unequal_ranks_equal_one_process(tmp_path):
    first, second = _views(7)
    shards = [(first[:2], second[:2]), (first[2:], second[2:])]
    for value in run_on_ranks(_rank, 2, tmp_path, shards):
        torch.testing.assert_close(value, Alignment()(first, second))


@pytest.mark.parametrize(
    ("views", "error", "message"),
    [
        ((torch.ones(3, 2), torch.ones(4, 2)), ValueError, r"`second` must have the shape of `first`, \(3, 2\)"),
        ((torch.ones(3), torch.ones(3)), ValueError, r"`first` must have shape \(N, d\), got \(3,\)"),
        ((torch.ones(3, 2), torch.ones(3, 2).int()), TypeError, "`second` must be a floating tensor, got torch.int32"),
    ],
)
def test_bad_arguments_are_named(views, error, message):
    with pytest.raises(error, match=message):
        Alignment().update(*views)
