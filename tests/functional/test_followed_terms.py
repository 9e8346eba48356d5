"""Terms of many matrices at once equal those of each, and those of a decomposition in float64."""

import math

import pytest
import torch
from torch import Tensor

from lightning_plugins.functional.followed_terms import followed_nuclear_terms, followed_rank_terms
from lightning_plugins.functional.stable_rank import exact_gradient, followed_term, whole_gradient
from lightning_plugins.functional.subspace import top_singular_subspace
from tests._waits import Waits


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_values(values, rows, columns, seed=0):
    left = torch.linalg.qr(random(rows, len(values), seed=seed, dtype=torch.float64))[0]
    right = torch.linalg.qr(random(columns, len(values), seed=seed + 1, dtype=torch.float64))[0]
    return ((left * torch.as_tensor(values, dtype=torch.float64)) @ right.mT).float()


WEIGHTS = {
    "of several shapes": lambda: [random(3, 48, 200), random(1, 200, 48, seed=1), random(2, 40, 40, seed=2)],
    "decaying": lambda: [with_values(torch.logspace(0, -6, 40), 40, 90)[None], random(2, 60, 44)],
    "nearly tied": lambda: [with_values([2, 1.999, 1.998, 1.5, *[1.0] * 10, *[0.3] * 26], 40, 90)[None]],
    "of low rank": lambda: [with_values([4.0, 3, 2, 1.5, 1.2, *[0.01] * 35], 40, 90)[None]],
    "small": lambda: [random(2, 5, 9), random(1, 9, 5, seed=1)],
}


def starts_of(weights: list[Tensor], count: int) -> list[Tensor]:
    return [top_singular_subspace(weight, min(count, *weight.shape[-2:])).start for weight in weights]


def norm(gradient: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(gradient)


def changed(weights: list[Tensor], step: int, speed: float = 3e-4) -> list[Tensor]:
    return [
        weight + speed * weight.square().mean().sqrt() * random(*weight.shape, seed=100 + step) for weight in weights
    ]


def followed(terms, weights, rank, steps=30):
    """Weights that change, and their terms, step by step."""
    starts = starts_of(weights, rank + 8)
    for step in range(steps):
        weights = changed(weights, step)
        with Waits() as waits:
            found = terms(weights, rank, starts)
        assert not waits.found
        starts = [term.start for term in found]
        yield list(zip(weights, found, strict=True))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("rank", [1, 4])
def test_equal_to_those_of_each_weight_by_decompositions(kind, rank):
    weights = WEIGHTS[kind]()
    alone = starts_of(weights, rank + 8)
    for pairs in followed(followed_rank_terms, weights, rank):
        for index, (weight, term) in enumerate(pairs):
            expected = followed_term(weight, rank, alone[index])
            alone[index] = expected.start
            found = whole_gradient(weight, term.scale, term.left, term.right)
            assert (norm(found - expected.gradient(weight)) / norm(expected.gradient(weight))).max() < 2e-3
            torch.testing.assert_close(term.value, expected.value, rtol=1e-4, atol=1e-6)
            exact = exact_gradient(weight.double(), rank, 2)
            assert (norm(found - exact.gradient) / norm(exact.gradient)).max() < 0.01
            torch.testing.assert_close(term.value.double(), exact.value, rtol=1e-3, atol=1e-6)
            identity = torch.eye(term.start.shape[-1]).expand(len(weight), -1, -1)
            torch.testing.assert_close(term.start.mT @ term.start, identity, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 10])
def test_gradient_by_products_stays_within_a_percent(rank):
    for pairs in followed(followed_nuclear_terms, WEIGHTS["of several shapes"](), rank):
        for weight, term in pairs:
            exact = exact_gradient(weight.double(), rank, 1)
            assert (norm(term.gradient - exact.gradient) / norm(exact.gradient)).max() < 0.01
            torch.testing.assert_close(term.value.double(), exact.value, rtol=2e-3, atol=0)


def test_gradient_by_products_lets_small_singular_values_pull_less():
    left, right = (torch.linalg.qr(random(n, 40, seed=n, dtype=torch.float64))[0] for n in (40, 60))
    values = torch.tensor([1.0] * 4 + [0.1] * 6 + [1e-5] * 10 + [0.0] * 20, dtype=torch.float64)
    weight = ((left * values) @ right.mT)[None]
    (term,) = followed_nuclear_terms([weight], 4, starts_of([weight], 12))
    pull = (left.mT @ term.gradient[0] @ right).diagonal() * 4  # by the sum over the head
    torch.testing.assert_close(pull[4:10], torch.ones(6).double(), rtol=5e-3, atol=0)
    assert bool((pull[10:20] > 0.1).all() and (pull[10:20] <= 1.01).all())
    torch.testing.assert_close(pull[20:], torch.zeros(20).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(term.value, torch.tensor([0.6001 / 4]).double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("terms", [followed_rank_terms, followed_nuclear_terms])
@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e7])
def test_finite_on_degenerate_weights(terms, scale):
    weights = [torch.zeros(2, 6, 8), scale * torch.eye(7)[None], scale * torch.ones(1, 8, 6)]
    starts = starts_of(weights, 4)
    for _ in range(3):
        found = terms(weights, 2, starts)
        starts = [term.start for term in found]
        for term in found:
            assert all(bool(part.isfinite().all()) for part in term)
            identity = torch.eye(4).expand(len(term.start), 4, 4)
            torch.testing.assert_close(term.start.mT @ term.start, identity, rtol=0, atol=1e-5)
    assert not found[0].value.any()
    torch.testing.assert_close(found[1].value, torch.tensor([2.5]))
    torch.testing.assert_close(found[2].value, torch.zeros(1), rtol=0, atol=1e-3)
    if terms is followed_nuclear_terms:
        assert not found[0].gradient.any()


@pytest.mark.parametrize("terms", [followed_rank_terms, followed_nuclear_terms])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_weight_that_is_not_finite_leaves_the_others_alone(terms, bad):
    weights = [random(2, 20, 30), random(1, 20, 40, seed=1)]
    starts = starts_of(weights, 9)
    expected = terms(weights, 1, starts)
    weights[0] = weights[0].clone()
    weights[0][1, 3, 4] = bad
    found = terms(weights, 1, starts)
    assert bool(found[0].value[1].isnan())
    torch.testing.assert_close(found[0].start[1], starts[0][1], rtol=0, atol=0)
    torch.testing.assert_close(found[0].value[0], expected[0].value[0])
    torch.testing.assert_close(found[1], expected[1])
    assert all(bool(part[0].isfinite().all()) for part in found[0])


def test_what_grows_back_from_zero_is_found():
    """The vectors of directions that vanish are kept, and turn towards those that appear."""
    weight = torch.diag(torch.tensor([3.0, 2.0, 0.0, 0.0]))[None]
    start = top_singular_subspace(weight, 3).start
    (term,) = followed_rank_terms([weight], 1, [start])
    weight[0, 3, 3], weight[0, 2, 3] = 5.0, 0.1
    for _ in range(12):
        (term,) = followed_rank_terms([weight], 1, [term.start])
    exact = exact_gradient(weight, 1, 2)
    torch.testing.assert_close(term.value, exact.value)
    torch.testing.assert_close(whole_gradient(weight, term.scale, term.left, term.right), exact.gradient)


def test_a_start_that_has_nothing_to_do_with_the_weight_is_recovered_from():
    """All columns are mapped onto the same one at first, and there is no reason to turn any of them."""
    start = torch.eye(20)[None, :, :5]
    for _ in range(4):
        (term,) = followed_rank_terms([torch.ones(1, 20, 30)], 1, [start])
        start = term.start
    torch.testing.assert_close(start.mT @ start, torch.eye(5)[None], rtol=0, atol=1e-5)
    torch.testing.assert_close(term.value, torch.zeros(1), rtol=0, atol=1e-5)
