import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_plugins.functional import (
    donsker_varadhan_bound,
    infonce_bound,
    js_bound,
    mine_loss,
    nwj_bound,
    smile_bound,
)


def random_scores(k, seed, scale=3.0):
    return scale * torch.randn(k, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(f):
    own = np.eye(len(f), dtype=bool)
    return f[own], f[~own]


def by_numpy(f):
    """Each formula written out, pair by pair."""
    own, off = parts(f)
    k = len(f)
    infonce = math.log(k) + np.mean([f[i, i] - math.log(sum(math.exp(v) for v in f[i])) for i in range(k)])
    dv = own.mean() - math.log(np.exp(off).mean())
    nwj = 1 + (own - 1).mean() - np.exp(off - 1).mean()
    return {"infonce": infonce, "dv": dv, "nwj": nwj}


@given(k=st.integers(2, 9), seed=st.integers(0, 2**31))
def test_bounds_are_their_formulas_and_infonce_stays_below_ln_k(k, seed):
    f = random_scores(k, seed)
    expected = by_numpy(f.numpy())
    for bound, name in ((infonce_bound, "infonce"), (donsker_varadhan_bound, "dv"), (nwj_bound, "nwj")):
        assert bound(f).item() == pytest.approx(expected[name], rel=1e-10, abs=1e-10)
    for scale in (0.0, 1.0, 1e3):
        assert infonce_bound(scale * f).item() <= math.log(k) + 1e-12
    assert js_bound(f).item() == pytest.approx(expected["nwj"], rel=1e-10, abs=1e-10)
    assert smile_bound(f, math.inf).item() == pytest.approx(expected["dv"], rel=1e-10, abs=1e-10)
    own, off = parts(f.numpy())
    clipped = own.mean() - math.log(np.exp(off.clip(-1, 1)).mean())
    assert smile_bound(f, 1.0).item() == pytest.approx(clipped, rel=1e-10, abs=1e-10)
    assert mine_loss(f)[0].item() == pytest.approx(-expected["dv"], rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("bound", [js_bound, smile_bound])
def test_gradient_is_that_of_jensen_and_shannon(bound):
    f = random_scores(5, 0).requires_grad_()
    (found,) = torch.autograd.grad(bound(f), f)
    own = torch.eye(5, dtype=torch.bool)
    expected = torch.where(own, torch.sigmoid(-f) / 5, -torch.sigmoid(f) / 20)  # of -softplus(-f) and -softplus(f)
    torch.testing.assert_close(found, expected.detach())


def test_gradients_by_finite_differences():
    for bound in (infonce_bound, donsker_varadhan_bound, nwj_bound):
        assert torch.autograd.gradcheck(bound, random_scores(4, 1).requires_grad_())


def test_mine_divides_by_the_moving_average():
    first, second = random_scores(4, 1), random_scores(4, 2).requires_grad_()
    _, average = mine_loss(first)
    loss, average = mine_loss(second, average, decay=0.7)
    means = [parts(f.detach().numpy().copy())[1] for f in (first, second)]
    expected = 0.7 * np.exp(means[0]).mean() + 0.3 * np.exp(means[1]).mean()
    assert average.exp().item() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(loss, second)
    own = torch.eye(4, dtype=torch.bool)
    wanted = torch.where(own, torch.full_like(gradient, -1 / 4), second.detach().exp() / 12 / expected)
    torch.testing.assert_close(gradient, wanted)


def test_half_precision_and_large_scores_stay_finite():
    f = (200 * torch.eye(4)).half()
    assert infonce_bound(f).dtype == torch.float32
    torch.testing.assert_close(infonce_bound(f), torch.tensor(math.log(4)))
    assert all(bool(bound(5 * f).isfinite()) for bound in (infonce_bound, donsker_varadhan_bound, smile_bound))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: infonce_bound(torch.zeros(1, 1)), ValueError, "`scores` must have shape .* with K >= 2.* with K = 1"),
        (lambda: nwj_bound(torch.zeros(2, 3)), ValueError, r"`scores` must have shape \(K, K\) .*got \(2, 3\)"),
        (
            lambda: infonce_bound(torch.zeros(2, 2).int()),
            TypeError,
            "`scores` must be a floating tensor, got torch.int",
        ),
        (lambda: infonce_bound([[1.0]]), TypeError, "`scores` must be a floating tensor, got list"),
        (lambda: smile_bound(torch.zeros(2, 2), 0.0), ValueError, "`clip` must be positive, got 0.0"),
        (lambda: smile_bound(torch.zeros(2, 2), math.nan), ValueError, "`clip` must be positive, got nan"),
        (lambda: mine_loss(torch.zeros(2, 2), decay=90), ValueError, r"`decay` must be in \[0, 1\].*mean 0.9"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
