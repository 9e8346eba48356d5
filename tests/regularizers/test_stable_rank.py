import math

import pytest
import torch

from lightning_plugins.functional.stable_rank import modified_stable_rank, stable_rank
from lightning_plugins.regularizers.stable_rank import ModifiedStableRank, StableRank

TERMS = [StableRank(0.3), StableRank(-0.3), ModifiedStableRank(0.3, 2), ModifiedStableRank(0.3, 2, p=2)]


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 3), (2, 3, 5, 4)], ids=str)
@pytest.mark.parametrize("term", TERMS, ids=repr)
def test_closed_form_is_the_loss_and_its_gradient(term, shape):
    matrix = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    loss = term(matrix)
    (expected,) = torch.autograd.grad(loss.sum(), matrix)
    value, gradient = term.value_and_gradient(matrix)
    torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(gradient, expected)
    assert not value.requires_grad


def test_is_weight_times_the_function():
    matrix = torch.randn(4, 6)
    torch.testing.assert_close(StableRank(-0.2)(matrix), -0.2 * stable_rank(matrix))
    torch.testing.assert_close(ModifiedStableRank(0.2, 1, p=2)(matrix), 0.2 * modified_stable_rank(matrix, 1, 2))


@pytest.mark.parametrize("p", [1, 2])
def test_in_a_training_the_tail_shrinks(p):
    torch.manual_seed(1)
    layer = torch.nn.Linear(12, 8)
    term, optimizer = ModifiedStableRank(1.0, 3, p), torch.optim.SGD(layer.parameters(), lr=0.1)
    before = modified_stable_rank(layer.weight, 3, p).item()
    for _ in range(50):
        optimizer.zero_grad()
        term(layer.weight).backward()
        optimizer.step()
    assert modified_stable_rank(layer.weight, 3, p).item() < 0.5 * before


def test_shows_its_settings():
    assert repr(StableRank(0.1)) == "StableRank(weight=0.1)"
    assert repr(ModifiedStableRank(0.1, 2)) == "ModifiedStableRank(weight=0.1, rank=2, p=1)"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: StableRank(math.inf), ValueError, "`weight` must be finite"),
        (lambda: StableRank("a"), TypeError, "`weight` must be a number"),
        (lambda: ModifiedStableRank(0.1, 0), ValueError, "`rank` must be at least 1"),
        (lambda: ModifiedStableRank(0.1, 2.0), TypeError, "did you mean 2"),
        (lambda: ModifiedStableRank(0.1, 2, p=0.5), ValueError, "`p` must be 1 or 2"),
        (lambda: StableRank(0.1)(torch.ones(3)), ValueError, "`matrix` must have shape"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
