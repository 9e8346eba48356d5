import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_plugins.metrics import Uniformity, uniformity
from tests._processes import run_on_ranks


def _rows(n, d=3, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def _by_pdist(rows, t=2.0):
    return torch.pdist(torch.nn.functional.normalize(rows)).square().mul(-t).exp().mean().log()


def _value(*batches, t=2.0):
    metric = Uniformity(batches[0].shape[1], t=t)
    for batch in batches:
        metric.update(batch)
    return metric.compute()


@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=4), seed=st.integers(0, 2**31), t=st.floats(0.1, 5.0))
def test_is_the_mean_over_all_pairs_however_rows_are_split(sizes, seed, t):
    rows = _rows(sum(sizes) + 2, seed=seed)
    torch.testing.assert_close(_value(*rows.split([*sizes, 2]), t=t), _by_pdist(rows, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 10, 11])
def test_blocks_do_not_change_the_value(chunk, monkeypatch):
    monkeypatch.setattr(uniformity, "_CHUNK", chunk)
    torch.testing.assert_close(_value(_rows(10)), _by_pdist(_rows(10)))


def test_all_zero_rows_stand_in_the_middle_of_the_sphere():
    rows = torch.cat([_rows(3), torch.zeros(2, 3)])
    unit = torch.nn.functional.normalize(_rows(3))
    squares = [
        *torch.pdist(unit).square(),
        *[torch.tensor(1.0)] * 6,
        torch.tensor(0.0),
    ]  # 3 * 2 pairs, and one of zeros
    torch.testing.assert_close(_value(rows), torch.stack(squares).mul(-2.0).exp().mean().log())


def test_fewer_than_two_rows_are_nan():
    assert _value(_rows(1)).isnan()
    assert _value(_rows(0)).isnan()


def test_half_precision_is_kept_as_float32():
    rows = _rows(10).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(_value(rows), _by_pdist(rows.float()))


def test_state_can_be_reset_pickled_and_saved():
    metric, restored = Uniformity(3), Uniformity(3)
    assert metric.state_dict() == {}
    for one in (metric, restored):
        one.persistent(True)
    metric.update(_rows(6))
    restored.load_state_dict(metric.state_dict())
    for one in (restored, pickle.loads(pickle.dumps(metric))):
        one.update(_rows(4, seed=1))
        torch.testing.assert_close(one.compute(), _value(_rows(6), _rows(4, seed=1)), rtol=0, atol=0)
    metric.reset()
    metric.update(_rows(4, seed=1))
    torch.testing.assert_close(metric.compute(), _value(_rows(4, seed=1)), rtol=0, atol=0)


def _rank(rank, shards):
    metric = Uniformity(3)
    for batch in shards[rank]:
        metric.update(batch)
    return metric.compute()


@pytest.mark.distributed
def test_two_unequal_ranks_equal_one_process(tmp_path):
    rows = _rows(11)
    for value in run_on_ranks(_rank, 2, tmp_path, [[rows[:2], rows[2:5]], [rows[5:]]]):
        torch.testing.assert_close(value, _by_pdist(rows))


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_a_rank_without_a_batch_equals_one_process(tmp_path):
    for value in run_on_ranks(_rank, 2, tmp_path, [[_rows(11)], []]):
        torch.testing.assert_close(value, _by_pdist(_rows(11)))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Uniformity(-1), ValueError, "`num_features` must be at least 1"),
        (lambda: Uniformity(3, t=0), ValueError, "`t` must be positive, got 0"),
        (lambda: Uniformity(3, t=math.nan), ValueError, "`t` must be finite"),
        (lambda: Uniformity(3, t="2"), TypeError, "`t` must be a number"),
        (lambda: Uniformity(3).update(torch.ones(4, 2)), ValueError, r"`embeddings` must have shape \(N, 3\)"),
    ],
)
def test_bad_arguments_are_named(build, error, message):
    with pytest.raises(error, match=message):
        build()
