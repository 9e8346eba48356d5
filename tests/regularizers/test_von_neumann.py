"""The entropy term equals eigenvalues taken one by one, and over ranks it equals one process with all the rows."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_plugins.distributed import world_size
from lightning_plugins.regularizers import VonNeumannEntropy
from lightning_plugins.regularizers.von_neumann import exchange_form
from tests._processes import counted_elements, run_on_ranks

WEIGHT = 0.3


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def reference(rows):
    """Another algorithm, for full-rank input: eigenvalues of the smaller Gram matrix, autograd through them."""
    z = rows / rows.norm(dim=1, keepdim=True)
    gram = z @ z.T if z.shape[0] <= z.shape[1] else z.T @ z
    eigenvalues = torch.linalg.eigvalsh(gram / len(z))
    return -(eigenvalues * eigenvalues.log()).sum()


@pytest.mark.parametrize("weight", [0.1, -2, 0])
@pytest.mark.parametrize("shape", [(1, 5), (3, 7), (7, 3), (4, 4)], ids=str)
def test_the_term_matches_numpy(shape, weight):
    h = draw(*shape)
    z = h.numpy() / np.linalg.norm(h.numpy(), axis=1, keepdims=True)
    p = np.linalg.eigvalsh(z.T @ z / len(z))
    p = p[p > 1e-12]
    term = VonNeumannEntropy(weight)
    torch.testing.assert_close(term(h).item(), float(weight * np.sum(p * np.log(p))))
    torch.testing.assert_close(term(h), -weight * term.entropy(h))


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("method", ["auto", "eigh"])
def test_first_and_second_derivatives(scope, method):
    term = VonNeumannEntropy(-0.7, scope=scope, method=method)
    h, memory = draw(5, 3).requires_grad_(), draw(2, 3, seed=1)
    assert torch.autograd.gradcheck(term, h)
    assert torch.autograd.gradgradcheck(term, h)
    assert torch.autograd.gradgradcheck(lambda h: term.entropy(h, memory), h)


@pytest.mark.parametrize(
    "h",
    [
        torch.ones(4, 3),
        torch.zeros(4, 3),
        torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
        torch.cat([draw(2, 6, dtype=torch.float32)] * 2),
        draw(1, 4, dtype=torch.float32),
    ],
    ids=["rank 1", "zero", "dead feature", "duplicates", "one row"],
)
def test_value_and_gradient_are_finite_on_degenerate_rows(h):
    h = h.clone().requires_grad_()
    value = VonNeumannEntropy(1.0)(h)
    value.backward()
    assert value.isfinite()
    assert h.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_whatever_autocast_says(dtype):
    term = VonNeumannEntropy(WEIGHT)
    h = draw(6, 4, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = term(h)
    value.backward()
    assert value.dtype == torch.float32
    assert h.grad.dtype == dtype
    torch.testing.assert_close(value, term(h.detach().float()))


def test_autocast_changes_nothing_with_remembered_rows():
    term, h, memory = VonNeumannEntropy(1.0), draw(6, 4, dtype=torch.float32), draw(9, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = term.entropy(h, memory)
    torch.testing.assert_close(inside, term.entropy(h, memory), rtol=0, atol=0)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_remembered_rows_join_the_spectrum_without_a_gradient(scope):
    term = VonNeumannEntropy(1.0, scope=scope)
    h, memory = draw(3, 4).requires_grad_(), (5 * draw(6, 4, seed=1)).requires_grad_()
    entropy, rows = term.entropy_with_rows(h, memory)
    expected = reference(torch.cat([h, memory.detach()]))
    torch.testing.assert_close(entropy, expected)
    torch.testing.assert_close(term.entropy(h, memory), expected)
    (gradient,) = torch.autograd.grad(expected, h)
    entropy.backward()
    torch.testing.assert_close(h.grad, gradient)
    assert memory.grad is None
    everything = torch.cat([memory, h]).detach()
    torch.testing.assert_close(rows, everything / everything.norm(dim=1, keepdim=True))
    assert not rows.requires_grad


def test_rows_alone_are_handed_back_where_none_are_remembered():
    term, h = VonNeumannEntropy(1.0), draw(3, 4)
    entropy, rows = term.entropy_with_rows(h)
    torch.testing.assert_close(entropy, reference(h))
    torch.testing.assert_close(rows, h / h.norm(dim=1, keepdim=True))


@given(rows=st.integers(1, 10**6), dim=st.integers(1, 10**5), ranks=st.integers(2, 4096))
def test_the_form_that_moves_fewer_elements_is_exchanged(rows, dim, ranks):
    def ring(elements):
        return elements * (ranks - 1)

    gathered, reduced = ring(rows * dim), 2 * ring(dim * dim)
    moved = {"rows": gathered, "matrix": reduced}
    assert moved[exchange_form(rows, dim)] == min(moved.values())


def test_the_settings_are_shown_and_the_module_has_no_state():
    term = VonNeumannEntropy(-0.1, scope="local")
    assert repr(term) == "VonNeumannEntropy(weight=-0.1, scope='local', method='auto')"
    assert not term.state_dict()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: VonNeumannEntropy(math.nan), ValueError, "`weight` must be finite, got nan"),
        (lambda: VonNeumannEntropy("0.1"), TypeError, "`weight` must be a number, got '0.1'"),
        (lambda: VonNeumannEntropy(1, scope="gobal"), ValueError, r"got 'gobal'; did you mean 'global'\?"),
        (lambda: VonNeumannEntropy(1, method="eig"), ValueError, r"got 'eig'; did you mean 'eigh'\?"),
        (lambda: VonNeumannEntropy(1)(torch.ones(4)), ValueError, r"`embeddings` must have shape \(N, d\) .*\(4,\)"),
        (lambda: VonNeumannEntropy(1)(torch.ones(2, 3, 4)), ValueError, r"got \(2, 3, 4\)"),
        (lambda: VonNeumannEntropy(1)(torch.ones(4, 0)), ValueError, "with at least one column"),
        (lambda: VonNeumannEntropy(1)(torch.ones(0, 4)), ValueError, r"at least one row, got none, shape \(0, 4\)"),
        (lambda: VonNeumannEntropy(1)(torch.ones(3, 4).int()), TypeError, "`embeddings` must be a floating tensor"),
        (lambda: VonNeumannEntropy(1)([[1.0]]), TypeError, "`embeddings` must be a floating tensor, got list"),
        (
            lambda: VonNeumannEntropy(1).entropy(torch.ones(3, 4), torch.ones(3)),
            ValueError,
            "`remembered` must have sh",
        ),
        (
            lambda: VonNeumannEntropy(1).entropy(torch.ones(3, 4), torch.ones(2, 5)),
            ValueError,
            r"`remembered` must have 4 columns as `embeddings` has, got shape \(2, 5\)",
        ),
        (
            lambda: VonNeumannEntropy(1).entropy_with_rows(torch.ones(3, 4), torch.ones(2, 4).long()),
            TypeError,
            "`remembered` must be a floating tensor",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


# Over ranks: rows of each rank (one rank has a single row, or none), columns, remembered rows, dtype.
INPUTS = 20  # at least the columns, so that the embeddings have full rank, as `reference` needs
CASES = {
    2: [
        ((1, 7), 3, 0, torch.float64),  # N > 2d: the matrix travels
        ((1, 7), 3, 5, torch.float64),
        ((1, 7), 16, 0, torch.float64),  # the rows travel
        ((1, 7), 16, 5, torch.float64),
        ((4, 4), 16, 0, torch.float64),
        ((3, 3), 3, 0, torch.float64),  # N = 2d
        ((0, 9), 3, 0, torch.float64),
        ((4, 0), 7, 2, torch.float64),
        ((5, 30), 4, 0, torch.float32),
        ((5, 3), 4, 0, torch.float32),
    ],
    3: [
        ((1, 8, 4), 3, 0, torch.float64),
        ((2, 1, 3), 8, 4, torch.float64),
        ((0, 7, 6), 2, 3, torch.float64),
        ((10, 1, 2), 4, 0, torch.float32),
    ],
}


def _problem(counts, dim, remembered, dtype):
    whole = draw(sum(counts), INPUTS, seed=1, dtype=dtype)
    weight = draw(dim, INPUTS, seed=2, dtype=dtype)
    memory = draw(remembered, dim, seed=3, dtype=dtype) if remembered else None
    return list(whole.split(counts)), weight, memory


def _ddp_step(rank, case):
    """One backward through DDP, in which rank k weighs the term by k + 1."""
    shards, weight, memory = _problem(*case)
    layer = nn.Linear(INPUTS, len(weight), bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    term = VonNeumannEntropy(WEIGHT)
    x = shards[rank].clone().requires_grad_()
    model = DistributedDataParallel(layer)  # kept: without it nobody averages the gradients
    h = model(x)
    with counted_elements() as forward:
        value = term(h) if memory is None else -WEIGHT * term.entropy(h, memory)
    with counted_elements() as backward:
        torch.autograd.grad(value, h, retain_graph=True)
    ((rank + 1) * value).backward()
    return {
        "value": value.detach(),
        "inputs": x.grad,
        "weight": layer.weight.grad,
        "forward": sum(forward.values()) - 3 * world_size(),  # less the numbers of rows, columns and calls
        "backward": sum(backward.values()),
        "rows": term.entropy_with_rows(h.detach(), memory),
    }


def _on_rank(rank, cases):
    h = draw(2 + rank, 3, seed=rank).requires_grad_()
    local = VonNeumannEntropy(1.0, scope="local")
    with counted_elements() as exchanged:
        alone = local(h)
        (first,) = torch.autograd.grad(alone, h, create_graph=True)
        first.square().sum().backward()
    refusals = []
    for make in (
        lambda: torch.autograd.grad(VonNeumannEntropy(1.0)(h), h, create_graph=True),
        lambda: VonNeumannEntropy(1.0)(h[:0]),
    ):
        try:
            make()
        except (RuntimeError, ValueError) as error:
            refusals.append(str(error))
    by_hand = torch.zeros(0, 3, dtype=torch.float64) if rank == 0 else h  # outside of any graph
    value = VonNeumannEntropy(1.0)(by_hand)
    value.backward()
    with torch.no_grad():
        unwatched = VonNeumannEntropy(1.0)(by_hand)
    return {
        "cases": [_ddp_step(rank, case) for case in cases],
        "local": (alone.detach(), exchanged),
        "refusals": refusals,
        "by_hand": (value.detach(), unwatched, unwatched.requires_grad),
    }


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    return run_on_ranks(_on_rank, request.param, tmp_path_factory.mktemp("ranks"), CASES[request.param])


def _close(actual, expected, dtype):
    tolerance = {"rtol": 1e-6, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(actual, expected, **tolerance)


@pytest.mark.distributed
def test_value_and_gradient_on_unequal_ranks_equal_one_process(ranks):
    n = len(ranks)
    for index, case in enumerate(CASES[n]):
        shards, weight, memory = _problem(*case)
        x, weight = torch.cat(shards).requires_grad_(), weight.requires_grad_()
        h = x @ weight.T
        value = -WEIGHT * reference(h if memory is None else torch.cat([h, memory]))
        inputs, weights = torch.autograd.grad(n * (n + 1) / 2 * value, [x, weight])
        results = [result["cases"][index] for result in ranks]
        for result in results:
            _close(result["value"], value.detach(), case[-1])
            torch.testing.assert_close(result["value"], results[0]["value"], rtol=0, atol=0)
            _close(result["weight"], weights / n, case[-1])  # DDP averages
        _close(torch.cat([result["inputs"] for result in results]), inputs, case[-1])


@pytest.mark.distributed
def test_the_smaller_form_travels_and_one_number_travels_back(ranks):
    for index, (counts, dim, _, dtype) in enumerate(CASES[len(ranks)]):
        rows, matrix = sum(counts) * dim, dim * dim
        # a reduced matrix, always in float64, goes round twice
        expected = rows if rows * dtype.itemsize <= 2 * matrix * torch.float64.itemsize else matrix
        for result in ranks:
            assert result["cases"][index]["forward"] == expected
            assert result["cases"][index]["backward"] == 1


@pytest.mark.distributed
def test_all_ranks_remember_the_same_rows(ranks):
    for index, case in enumerate(CASES[len(ranks)]):
        shards, weight, memory = _problem(*case)
        rows = torch.cat(shards) @ weight.T
        everything = rows if memory is None else torch.cat([memory, rows])
        for result in ranks:
            entropy, remembered = result["cases"][index]["rows"]
            _close(entropy, reference(everything), case[-1])
            _close(remembered, everything / everything.norm(dim=1, keepdim=True), case[-1])


@pytest.mark.distributed
def test_the_local_scope_exchanges_nothing_and_can_be_differentiated_twice(ranks):
    for rank, result in enumerate(ranks):
        value, exchanged = result["local"]
        torch.testing.assert_close(value, -reference(draw(2 + rank, 3, seed=rank)))
        assert exchanged == {}


@pytest.mark.distributed
def test_a_second_derivative_and_a_batch_without_rows_are_refused_on_every_rank(ranks):
    for result in ranks:
        second, empty = result["refusals"]
        assert "no second derivative" in second
        assert "`embeddings` must have at least one row, got none on any rank" in empty


@pytest.mark.distributed
def test_a_rank_without_rows_made_by_hand_does_not_stop_the_others(ranks):
    expected = -reference(torch.cat([draw(2 + rank, 3, seed=rank) for rank in range(1, len(ranks))]))
    for result in ranks:
        value, unwatched, watched = result["by_hand"]
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(unwatched, expected)
        assert not watched
