import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_plugins.functional import assign_folds, group_normal, hash_groups, hash_rows


def splitmix64(x: int) -> int:
    """The published generator's output for a state, in Python's integers."""
    mask = 2**64 - 1
    z = (x + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@given(value=st.integers(-(2**63), 2**63 - 1))
def test_hash_is_splitmix64(value):
    assert hash_groups(torch.tensor([value])).item() % 2**64 == splitmix64(value % 2**64)


def test_folds_are_even_and_independent_of_seeds():
    groups = torch.arange(20_000)
    counts = [assign_folds(groups, 5, seed=seed).bincount(minlength=5) for seed in (0, 1)]
    for count in counts:
        assert (count - 4000).abs().max() < 300
    both = assign_folds(groups, 5) * 5 + assign_folds(groups, 5, seed=1)
    assert (both.bincount(minlength=25) - 800).abs().max() < 150


def test_rows_are_told_apart_by_contents():
    rows = torch.randn(500, 6)
    numbers = hash_rows(rows)
    assert numbers.unique().numel() == 500
    assert torch.equal(hash_rows(rows.flip(0)).flip(0), numbers)
    assert torch.equal(hash_rows(rows.double()), numbers)
    assert hash_rows(torch.tensor([[0.0]])) == hash_rows(torch.tensor([[-0.0]]))
    assert hash_rows(torch.tensor([[1, 2]])) != hash_rows(torch.tensor([[2, 1]]))


def test_normal_numbers_are_normal_and_one_per_group():
    draws = group_normal(torch.arange(50_000), seed=3)
    assert draws.mean().abs() < 0.02
    assert (draws.std() - 1).abs() < 0.02
    assert (draws.pow(4).mean() - 3).abs() < 0.15
    assert torch.equal(group_normal(torch.tensor([5, 6, 5]), seed=3), draws[[5, 6, 5]])


def test_refusals():
    with pytest.raises(TypeError, match=r"`groups` must be an integer tensor, got torch\.float32"):
        hash_groups(torch.ones(2))
    with pytest.raises(ValueError, match="`folds` must be at least 1, got 0"):
        assign_folds(torch.arange(3), 0)
