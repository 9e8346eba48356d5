"""Promises of every term of a loss; a new one is found in `lightning_plugins.regularizers` and needs no row here."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_plugins.distributed import world_size
from tests._processes import run_on_ranks
from tests.regularizers.terms import EMBEDDING_TERMS, WEIGHT_TERMS, draw, gradient_of, make

every_embedding_term = pytest.mark.parametrize("name", EMBEDDING_TERMS)
every_weight_term = pytest.mark.parametrize("name", WEIGHT_TERMS)
DEGENERATE = {
    "equal rows": torch.ones(4, 3),
    "zeros": torch.zeros(4, 3),
    "a dead feature": torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
    "duplicates": torch.cat([draw(2, 6, dtype=torch.float32)] * 2),
    "one row": draw(1, 4, dtype=torch.float32),
    "one column": draw(4, 1, dtype=torch.float32),
    "ties": torch.eye(4),
    "tiny": 1e-30 * draw(5, 3, dtype=torch.float32),
    "large": 1e6 * draw(5, 3, dtype=torch.float32),
}


def test_the_terms_are_found():
    assert {"CodingRate", "SIGReg", "SpreadOut"} <= set(EMBEDDING_TERMS)
    assert {"StableRank", "NuclearNorm", "SoftOrthogonality"} <= set(WEIGHT_TERMS)


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", EMBEDDING_TERMS + WEIGHT_TERMS)
def test_value_and_gradient_are_finite_on_degenerate_input(name: str, case: str):
    matrix = DEGENERATE[case]
    if name == "ModifiedStableRank" and min(matrix.shape) < 3:
        matrix = torch.ones(3, 3)
    assert make(name)(matrix).isfinite()
    assert gradient_of(make(name), matrix).isfinite().all()


@pytest.mark.parametrize("name", EMBEDDING_TERMS)
@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 9), d=st.integers(1, 9), rank=st.integers(1, 9), seed=st.integers(0, 999))
def test_value_and_gradient_are_finite_whatever_the_shape_and_rank(name: str, n: int, d: int, rank: int, seed: int):
    rows = draw(n, rank, seed=seed, dtype=torch.float32) @ draw(rank, d, seed=seed + 1, dtype=torch.float32)
    assert make(name)(rows).isfinite()
    assert gradient_of(make(name), rows).isfinite().all()


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (4, 4)], ids=str)
@pytest.mark.parametrize("name", EMBEDDING_TERMS + WEIGHT_TERMS)
def test_first_and_second_derivatives(name: str, shape: tuple[int, int]):
    term, matrix = make(name, weight=-0.7), draw(*shape, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(term, matrix)
    assert torch.autograd.gradgradcheck(term, matrix)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("name", ["RenyiEntropy", "CodingRate", "SpreadOut", "Decorrelation"])
def test_centred_or_not(name: str, centred: bool):
    term, rows = make(name, centred=centred), draw(6, 3)
    moved = torch.allclose(term(rows), term(rows + 2.0), rtol=1e-6, atol=1e-9)
    assert moved == centred
    assert torch.autograd.gradgradcheck(term, rows.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_embedding_term
def test_half_precision_is_computed_in_float32_whatever_autocast_says(name: str, dtype: torch.dtype):
    term, rows = make(name), draw(6, 4, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = term(rows)
    value.backward()
    assert value.dtype == torch.float32
    assert rows.grad is not None
    assert rows.grad.dtype == dtype
    torch.testing.assert_close(value, term(rows.detach().float()))


@pytest.mark.parametrize("shape", [(64, 16), (16, 64)], ids=str)
@every_embedding_term
def test_gradient_of_collapsed_rows_in_float32_is_that_of_float64(name: str, shape: tuple[int, int]):
    """Spread a thousandth of the mean: the regime in which such a term is wanted."""
    rows = (1 + 1e-3 * draw(*shape)).float()
    gradient, exact = gradient_of(make(name), rows).double(), gradient_of(make(name), rows.double())
    assert (gradient - exact).norm() < 0.01 * exact.norm()


@every_embedding_term
def test_remembered_rows_join_without_a_gradient(name: str):
    term, rows, memory = make(name), draw(3, 4), draw(6, 4, seed=1)
    leaf = rows.clone().requires_grad_()
    value, everything = term.with_rows(leaf, memory)
    whole = torch.cat([memory, rows])
    torch.testing.assert_close(value.detach(), term(whole))
    torch.testing.assert_close(everything, whole)
    value.backward()
    torch.testing.assert_close(leaf.grad, gradient_of(term, whole)[6:])


@pytest.mark.parametrize("name", EMBEDDING_TERMS + WEIGHT_TERMS)
def test_a_value_that_is_not_finite_is_not_hidden(name: str):
    matrix = draw(5, 3)
    matrix[2, 1] = torch.nan
    assert not make(name)(matrix).isfinite()


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (2, 5, 4)], ids=str)
@every_weight_term
def test_closed_form_equals_autograd(name: str, shape: tuple[int, ...]):
    term, matrix = make(name, weight=0.3), draw(*shape, seed=5)
    value, gradient = term.value_and_gradient(matrix)
    torch.testing.assert_close(value, term(matrix))
    torch.testing.assert_close(gradient, gradient_of(term, matrix))


@pytest.mark.parametrize("name", EMBEDDING_TERMS + WEIGHT_TERMS)
def test_settings_are_shown_and_there_is_no_state(name: str):
    assert repr(make(name, weight=0.25)).startswith(f"{name}(weight=0.25")
    assert not make(name).state_dict()


# Rows of each process (one has a single row, or none) and columns.
CASES = {2: [((1, 7), 3), ((4, 4), 16), ((0, 9), 3)], 3: [((1, 8, 4), 3), ((0, 7, 6), 16)]}


def problem(counts: tuple[int, ...], dim: int) -> tuple[Any, torch.Tensor]:
    return list(draw(sum(counts), 5, seed=1).split(counts)), draw(dim, 5, seed=2)


def step_in_parallel(rank: int, processes: int) -> list[Any]:
    """One backward through DDP for every term and case, in which process k weighs the term by k + 1."""
    results = []
    for name in EMBEDDING_TERMS:
        for counts, dim in CASES[processes]:
            parts, weight = problem(counts, dim)
            layer = nn.Linear(5, dim, bias=False, dtype=torch.float64)
            with torch.no_grad():
                layer.weight.copy_(weight)
            parallel = DistributedDataParallel(layer)
            value, rows = make(name).with_rows(parallel(parts[rank]), draw(2, dim, seed=4))
            ((rank + 1) * value).backward()
            local = make(name, scope="local")(parts[rank] @ weight.T) if len(parts[rank]) else None
            results.append((value.detach(), layer.weight.grad, rows, local))
    assert world_size() == processes
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 3])
def test_unequal_processes_equal_one(processes: int, tmp_path: Any):
    found = run_on_ranks(step_in_parallel, processes, tmp_path, processes)
    index = 0
    for name in EMBEDDING_TERMS:
        for counts, dim in CASES[processes]:
            parts, weight = problem(counts, dim)
            leaf = weight.clone().requires_grad_()
            value, rows = make(name).with_rows(torch.cat(parts) @ leaf.T, draw(2, dim, seed=4))
            share = sum(k + 1 for k in range(processes)) / processes  # DDP averages
            (gradient,) = torch.autograd.grad(share * value, leaf)
            for rank, results in enumerate(found):
                torch.testing.assert_close(results[index][0], value.detach(), msg=f"{name} {counts}: value")
                torch.testing.assert_close(results[index][1], gradient, msg=f"{name} {counts}: gradient")
                torch.testing.assert_close(results[index][2], rows, msg=f"{name} {counts}: rows")
                if counts[rank]:
                    alone = make(name)(parts[rank] @ weight.T)
                    torch.testing.assert_close(results[index][3], alone, msg=f"{name} {counts}: local")
            index += 1


def differentiate_twice(rank: int) -> str:
    rows = draw(3, 2, seed=rank).requires_grad_()
    try:
        torch.autograd.grad(make("CodingRate")(rows), rows, create_graph=True)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_second_derivative_over_processes_is_refused(tmp_path: Any):
    for message in run_on_ranks(differentiate_twice, 2, tmp_path):
        assert "use `scope='local'`" in message


@pytest.mark.parametrize(
    "name", ["ModifiedStableRank", "NuclearNorm", "SoftOrthogonality", "SpectralNorm", "StableRank"]
)
def test_messages_name_the_argument_of_the_call(name: str):
    """`weight` is the strength of the term, not what it is called with."""
    for call in (make(name), make(name).value_and_gradient):
        with pytest.raises(ValueError, match=r"`matrix` must have shape \(..., m, n\), got \(3,\)"):
            call(torch.ones(3))
        with pytest.raises(TypeError, match=r"`matrix` must be a floating tensor, got torch\.int64"):
            call(torch.ones(3, 3, dtype=torch.int64))
