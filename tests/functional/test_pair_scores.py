import math

import pytest
import torch

from lightning_plugins.functional import (
    bound_from_pairs,
    donsker_varadhan_bound,
    infonce_bound,
    nwj_bound,
    pair_scores,
)
from lightning_plugins.functional.pair_scores import candidate_bound, row_keys

BOUNDS = {"infonce": infonce_bound, "dv": donsker_varadhan_bound, "nwj": nwj_bound}


def inner(x, y):
    return x @ y.T


def rows(n, d=3, seed=0):
    return torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).unbind()


@pytest.mark.parametrize("bound", BOUNDS)
def test_blocks_equal_the_whole_matrix(bound, monkeypatch):
    import sys

    module = sys.modules["lightning_plugins.functional.pair_scores"]
    monkeypatch.setattr(module, "_ROWS", 7)
    monkeypatch.setattr(module, "_COLUMNS", 3)
    x, y = rows(53)
    found = bound_from_pairs(pair_scores(x, y, inner, num_groups=6), bound)
    assert found.value == pytest.approx(BOUNDS[bound](x @ y.T).item(), rel=1e-12)
    assert found.num_candidates == 53


def test_error_is_the_jackknife_written_out():
    x, y = rows(40)
    pairs = pair_scores(x, y, inner, num_groups=5)
    left_out = []
    for group in range(5):
        kept = torch.tensor([i for i in range(40) if not 8 * group <= i < 8 * group + 8])
        left_out.append(infonce_bound(x[kept] @ y[kept].T))
    values = torch.stack(left_out)
    expected = (4 / 5 * (values - values.mean()).square().sum()).sqrt().item()
    assert bound_from_pairs(pairs).standard_error == pytest.approx(expected, rel=1e-9)


def test_error_covers_the_spread_over_samples():
    found = [candidate_bound(*(0.8 * part for part in rows(200, seed=seed)), inner) for seed in range(60)]
    values = torch.tensor([one.value for one in found])
    errors = torch.tensor([one.standard_error for one in found])
    assert 0.7 < float(errors.median() / values.std()) < 1.4


def test_some_anchors_keep_all_candidates():
    x, y = rows(50)
    f = x @ y.T
    chosen = torch.arange(10) * 5
    expected = math.log(50) + (f.diagonal() - f.logsumexp(1))[chosen].mean()
    found = bound_from_pairs(pair_scores(x, y, inner, max_anchors=10))
    assert found.value == pytest.approx(expected.item())


def test_batches_of_candidates_are_averaged():
    x, y = rows(33)
    expected = torch.stack([infonce_bound(x[i : i + 8] @ y[i : i + 8].T) for i in (0, 8, 16, 24)])
    found = candidate_bound(x, y, inner, num_candidates=8)
    assert found.value == pytest.approx(expected.mean().item())
    assert found.standard_error == pytest.approx(expected.std().item() / 2)


def test_keys_follow_the_values_and_look_random():
    x, y = (part.float() for part in rows(2000))
    keys = row_keys(x, y)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(row_keys(x[order], y[order]), keys[order])
    assert len(keys.unique()) == 2000
    assert 0.4 < float((keys > 0).double().mean()) < 0.6
    ranks = keys.argsort().argsort().double()
    assert abs(float(torch.corrcoef(torch.stack([ranks, x[:, 0].double()]))[0, 1])) < 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pair_scores(torch.ones(1, 2), torch.ones(1, 2), inner), "at least 2 .with K = 1"),
        (lambda: pair_scores(torch.ones(3, 2), torch.ones(4, 2), inner), "the same number of rows.* got 3 and 4"),
        (lambda: candidate_bound(*rows(4), inner, num_candidates=1), r"`num_candidates` must be in \[2, 4\]"),
        (lambda: candidate_bound(*rows(4), inner, num_candidates=5), r"`num_candidates` must be in \[2, 4\]"),
        (lambda: candidate_bound(*rows(4), inner, bound="infonec"), "did you mean 'infonce'"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
