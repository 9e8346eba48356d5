import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_plugins.functional import infonce_bound, nwj_bound
from lightning_plugins.metrics import MutualInformation
from tests._processes import run_on_ranks


def views(n, d=3, seed=0):
    return torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed)).unbind()


def value(batches, **arguments):
    metric = MutualInformation(batches[0][0].shape[1], **arguments)
    for x, y in batches:
        metric.update(x, y)
    return metric.compute()


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=4), seed=st.integers(0, 2**31))
def test_is_the_bound_of_all_pairs_however_they_are_split(sizes, seed):
    x, y = views(sum(sizes) + 2, seed=seed)
    batches = list(zip(x.split([*sizes, 2]), y.split([*sizes, 2]), strict=True))
    for name, bound in (("infonce", infonce_bound), ("nwj", nwj_bound)):
        found = value(batches, bound=name)
        torch.testing.assert_close(found["estimate"], bound(x @ y.T), rtol=1e-5, atol=1e-5)
    assert found["num_candidates"] == len(x)
    assert found["ceiling"].item() == pytest.approx(math.log(len(x)))


def test_units_candidates_and_critic():
    x, y = views(32)
    nats, bits = value([(x, y)], num_candidates=8), value([(x, y)], num_candidates=8, units="bits")
    torch.testing.assert_close(bits["estimate"] * math.log(2), nats["estimate"])
    assert bits["ceiling"] == 3
    far = value([(x, y)], critic=lambda a, b: -torch.cdist(a, b))
    torch.testing.assert_close(far["estimate"], infonce_bound(-torch.cdist(x, y)), rtol=1e-5, atol=1e-5)


def test_sample_of_many_rows_is_the_same_however_they_come():
    x, y = views(400)
    whole = value([(x, y)], max_pairs=50)
    parts = value(list(zip(x.split(30), y.split(30), strict=True))[::-1], max_pairs=50)
    assert whole == parts
    assert whole["num_candidates"] == 50


def test_too_few_pairs_are_nan():
    assert value([views(1)])["estimate"].isnan()
    assert value([views(5)], num_candidates=6)["estimate"].isnan()
    assert MutualInformation(3).to("cpu").compute()["estimate"].isnan()


def test_half_precision_and_pickling():
    x, y = (part.bfloat16() for part in views(20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value([(x, y)])
    torch.testing.assert_close(found["estimate"], infonce_bound(x.float() @ y.float().T), rtol=1e-5, atol=1e-5)
    metric = MutualInformation(3)
    metric.update(*views(6))
    copy = pickle.loads(pickle.dumps(metric))
    assert copy.compute() == metric.compute()
    metric.reset()
    assert metric.compute()["estimate"].isnan()


def _rank(rank, shards):
    metric = MutualInformation(3)
    for batch in shards[rank]:
        metric.update(*batch)
    return metric.compute()


@pytest.mark.distributed
def test_unequal_processes_equal_one(tmp_path):
    x, y = views(23)
    expected = value([(x, y)])
    two = [[(x[:5], y[:5])], [(x[5:7], y[5:7]), (x[7:], y[7:])]]
    three = [[], [(x[:4], y[:4])], [(x[4:], y[4:])]]  # one has none
    for shards in (two, three):
        for found in run_on_ranks(_rank, len(shards), tmp_path, shards):
            assert found == expected  # the standard error too, since the order is of the values


BAD = {
    "no feature": ({"x_features": 0}, ValueError, "`x_features` must be at least 1"),
    "other widths": ({"x_features": 2, "y_features": 3}, ValueError, "`critic=None` takes inner products"),
    "critic": ({"x_features": 2, "critic": "joint"}, TypeError, "`critic` must be callable or None, got str"),
    "bound": ({"x_features": 2, "bound": "nj"}, ValueError, "`bound` must be .* did you mean 'nwj'"),
    "one candidate": ({"x_features": 2, "num_candidates": 1}, ValueError, r"`num_candidates` must be in \[2, "),
    "clip": ({"x_features": 2, "clip": 0}, ValueError, "`clip` must be positive"),
    "units": ({"x_features": 2, "units": "bit"}, ValueError, "`units` must be .* did you mean 'bits'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        MutualInformation(**arguments)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((torch.ones(3, 2), torch.ones(4, 2)), ValueError, "`y` must have a row for each of the 3 rows"),
        ((torch.ones(3, 3), torch.ones(3, 2)), ValueError, r"`x` must have shape \(N, 2\)"),
        ((torch.ones(3, 2), torch.ones(3, 2).int()), TypeError, "`y` must be a floating tensor"),
    ],
)
def test_bad_batches_are_named(batch, error, message):
    with pytest.raises(error, match=message):
        MutualInformation(2).update(*batch)
