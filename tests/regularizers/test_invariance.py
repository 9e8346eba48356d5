"""The I-VNE+ loss equals its formula written with loops over pairs, and over ranks that of one process."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from torch.nn.parallel import DistributedDataParallel

from lightning_plugins.regularizers import InvarianceVNE
from tests._processes import run_on_ranks


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def reference(views, large, invariance_weight=None, entropy_weight=1.0):
    """The formula with a loop over pairs and, for full-rank views, eigenvalues through autograd."""
    pairs = [(i, j) for i in range(large) for j in range(len(views)) if i != j]
    cosine = sum(cosine_similarity(views[i], views[j]).mean() for i, j in pairs) / len(pairs)
    entropies = []
    for view in views:
        z = view / view.norm(dim=1, keepdim=True)
        gram = z @ z.T if z.shape[0] <= z.shape[1] else z.T @ z
        p = torch.linalg.eigvalsh(gram / len(z))
        entropies.append(-(p * p.log()).sum())
    weight = math.log(len(views[0])) if invariance_weight is None else invariance_weight
    return -weight * cosine - entropy_weight * sum(entropies) / len(entropies)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)], ids=str)
@pytest.mark.parametrize(("views", "large"), [(2, None), (2, 1), (5, 2), (3, 3)])
@pytest.mark.parametrize("weights", [(None, 1.0), (0.5, -2.0)], ids=str)
def test_value_and_gradient_match_the_loop(views, large, weights, shape):
    batch = [draw(*shape, seed=seed).requires_grad_() for seed in range(views)]
    value = InvarianceVNE(*weights)(batch, large)
    expected = reference(batch, large or views, *weights)
    torch.testing.assert_close(value, expected)
    for actual, wanted in zip(torch.autograd.grad(value, batch), torch.autograd.grad(expected, batch), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_the_published_weight_at_batch_64_is_4_16():
    view = draw(64, 8)
    aligned = InvarianceVNE(entropy_weight=0.0)([view, view])
    assert round(-aligned.item(), 2) == 4.16


def test_second_derivatives():
    loss = InvarianceVNE()
    views = tuple(draw(4, 3, seed=seed).requires_grad_() for seed in range(3))
    assert torch.autograd.gradgradcheck(lambda *views: loss(views, 2), views)


def test_one_sample_has_weight_zero_and_a_finite_gradient():
    views = [draw(1, 4, seed=seed).requires_grad_() for seed in range(2)]
    value = InvarianceVNE()(views)
    value.backward()
    torch.testing.assert_close(value.item(), 0.0, atol=1e-12, rtol=0)
    assert all(view.grad.isfinite().all() for view in views)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_whatever_autocast_says(dtype):
    views = [draw(6, 4, seed=seed, dtype=dtype) for seed in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = InvarianceVNE()(views)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, InvarianceVNE()([view.float() for view in views]))


def test_the_settings_are_shown():
    shown = "InvarianceVNE(invariance_weight=None, entropy_weight=2.0, scope='local', method='auto')"
    assert repr(InvarianceVNE(entropy_weight=2.0, scope="local")) == shown


TWO = [torch.ones(3, 4), torch.ones(3, 4)]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (partial(InvarianceVNE, math.inf), ValueError, "`invariance_weight` must be finite, got inf"),
        (partial(InvarianceVNE, "a"), TypeError, "`invariance_weight` must be a number, got 'a'"),
        (partial(InvarianceVNE, 1, None), TypeError, "`entropy_weight` must be a number, got None"),
        (partial(InvarianceVNE, scope="locale"), ValueError, r"got 'locale'; did you mean 'local'\?"),
        (partial(InvarianceVNE, method="svd"), ValueError, "`method` must be"),
        (lambda: InvarianceVNE()(torch.ones(2, 3, 4)), TypeError, r"got Tensor; did you mean `views\.unbind\(\)`"),
        (lambda: InvarianceVNE()(iter(TWO)), TypeError, "`views` must be a list of tensors, got list_iterator$"),
        (lambda: InvarianceVNE()(TWO[:1]), ValueError, "`views` must hold at least two views of the batch, got 1"),
        (lambda: InvarianceVNE()([TWO[0], torch.ones(3, 5)]), ValueError, r"one shape .*, got \(3, 4\) and \(3, 5\)"),
        (lambda: InvarianceVNE()([TWO[0], torch.ones(3)]), ValueError, r"`views\[1\]` must have shape \(N, d\)"),
        (lambda: InvarianceVNE()([TWO[0], TWO[1].int()]), TypeError, r"`views\[1\]` must be a floating tensor"),
        (lambda: InvarianceVNE()([torch.ones(0, 4)] * 2), ValueError, "`views` must have at least one row, got none"),
        (lambda: InvarianceVNE()(TWO, 3), ValueError, "`large_views` must be at most the number of views, 2, got 3"),
        (lambda: InvarianceVNE()(TWO, 0), ValueError, "`large_views` must be at least 1, got 0"),
        (lambda: InvarianceVNE()(TWO, 1.0), TypeError, r"`large_views` must be an int .*; did you mean 1\?"),
    ],
)
def test_wrong_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


INPUTS = 12  # at least the columns, so that the views have full rank, as `reference` needs
VIEWS, LARGE = 3, 2
CASES = {
    2: [
        ((1, 9), 3, torch.float64),  # N > 2d: the matrix travels
        ((1, 6), 11, torch.float64),  # the rows travel
        ((0, 5), 4, torch.float64),
        ((20, 3), 4, torch.float32),
    ],
    3: [((2, 1, 7), 3, torch.float64), ((2, 0, 3), 9, torch.float64)],
}


def _problem(counts, dim, dtype):
    whole = [draw(sum(counts), INPUTS, seed=seed, dtype=dtype) for seed in range(VIEWS)]
    return whole, [view.split(counts) for view in whole], draw(dim, INPUTS, seed=9, dtype=dtype)


def _on_rank(rank, cases):
    results = []
    for case in cases:
        _, shards, weight = _problem(*case)
        layer = nn.Linear(INPUTS, len(weight), bias=False, dtype=weight.dtype)
        layer.weight.data.copy_(weight)
        model = DistributedDataParallel(layer)
        views = model(torch.stack([view[rank] for view in shards])).unbind()
        value = InvarianceVNE()(views, LARGE)
        value.backward()
        results.append((value.detach(), layer.weight.grad))
    by_hand = [draw(0 if rank == 0 else 4, 3, seed=seed) for seed in range(2)]  # outside of any graph on rank 0
    by_hand = [view.requires_grad_(rank > 0) for view in by_hand]
    value = InvarianceVNE()(by_hand)
    value.backward()
    local = InvarianceVNE(scope="local")([draw(2 + rank, 3, seed=seed) for seed in range(2)])
    return {"cases": results, "by_hand": value.detach(), "local": local}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    return run_on_ranks(_on_rank, request.param, tmp_path_factory.mktemp("ranks"), CASES[request.param])


@pytest.mark.distributed
def test_value_and_gradient_on_unequal_ranks_equal_one_process(ranks):
    for index, case in enumerate(CASES[len(ranks)]):
        whole, _, weight = _problem(*case)
        weight.requires_grad_()
        expected = reference([view @ weight.T for view in whole], LARGE)
        (gradient,) = torch.autograd.grad(expected, weight)
        rtol, atol = (1e-6, 1e-9) if case[-1] == torch.float64 else (1e-5, 1e-5)
        for result in ranks:
            value, averaged = result["cases"][index]
            torch.testing.assert_close(value, expected.detach(), rtol=rtol, atol=atol)
            torch.testing.assert_close(averaged, gradient, rtol=rtol, atol=atol)


@pytest.mark.distributed
def test_a_rank_without_rows_made_by_hand_does_not_stop_the_others(ranks):
    views = [torch.cat([draw(4, 3, seed=seed)] * (len(ranks) - 1)) for seed in range(2)]
    for result in ranks:
        torch.testing.assert_close(result["by_hand"], reference(views, 2))


@pytest.mark.distributed
def test_the_local_scope_is_that_of_the_own_rows(ranks):
    for rank, result in enumerate(ranks):
        torch.testing.assert_close(result["local"], reference([draw(2 + rank, 3, seed=seed) for seed in range(2)], 2))
