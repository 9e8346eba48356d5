"""Folds and random numbers derived from the identity of a group, independent of the order of rows."""

import math

import torch
from torch import Tensor

from lightning_plugins._checks import check_int, check_positive_int
from lightning_plugins.functional.tensors import check_dims, check_integers, check_real

_MIX = ((30, -4658895280553007687), (27, -7723592293110705685))  # splitmix64's shifts and multipliers, as int64
_STEP = -7046029254386353131


def assign_folds(groups: Tensor, folds: int, *, seed: int = 0) -> Tensor:
    """Hash groups to folds, so that all rows of a group are in the same fold, in every batch and process.

    Args:
        groups: Integer tensor of any shape: which group (word type, patient, image) a row belongs to.
        folds: Number of folds.
        seed: Another seed gives other folds.

    Returns:
        Integer tensor of the shape of ``groups`` with values in ``[0, folds)``.

    Raises:
        TypeError: If ``groups`` is not an integer tensor.
        ValueError: If ``folds`` is less than 1.

    Example:
        >>> assign_folds(torch.tensor([7, 7, 8, 9, 7]), 5)[[0, 1, 4]].unique().numel()
        1
    """
    check_positive_int("folds", folds)
    return positive(hash_groups(groups, seed=seed)) % folds


def hash_groups(groups: Tensor, *, seed: int = 0) -> Tensor:
    """Scramble 64-bit integers: neighbours get unrelated values, and different groups different values.

    Args:
        groups: Integer tensor of any shape.
        seed: Another seed gives other values.

    Returns:
        Tensor of dtype int64 and the shape of ``groups``.

    Raises:
        TypeError: If ``groups`` is not an integer tensor.

    Example:
        >>> hash_groups(torch.arange(1000)).unique().numel()
        1000

    Source:
        The finaliser of SplitMix64: Steele, Lea and Flood, OOPSLA 2014.
    """
    check_integers("groups", groups)
    seed = check_int("seed", seed)
    mixed = groups.long() + _wrapped(_STEP * (seed + 1))
    for shift, factor in _MIX:
        mixed = (mixed ^ _shifted(mixed, shift)) * factor
    return mixed ^ _shifted(mixed, 31)


def hash_rows(rows: Tensor, *, seed: int = 0) -> Tensor:
    """Number rows by their contents: equal rows get the same number, in any batch or process.

    Args:
        rows: Tensor of shape ``(N, ...)``, floating or integer. Floating values count as float32.
        seed: Another seed gives other numbers.

    Returns:
        Tensor of dtype int64 and shape ``(N,)``.

    Example:
        >>> numbers = hash_rows(torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]]))
        >>> (numbers[0] == numbers[2]).item(), (numbers[0] == numbers[1]).item()
        (True, False)
    """
    check_real("rows", rows)
    check_dims("rows", rows, 1, "(N, ...)")
    seed = check_int("seed", seed)
    flat = rows.detach().reshape(len(rows), math.prod(rows.shape[1:]))
    bits = (flat.float() + 0.0).view(torch.int32) if flat.is_floating_point() else flat  # -0.0 counts as 0.0
    factors = hash_groups(torch.arange(flat.shape[1], device=flat.device), seed=seed) | 1
    return hash_groups((hash_groups(bits.long()) * factors).sum(dim=1), seed=seed)


def group_normal(groups: Tensor, *, seed: int = 0) -> Tensor:
    """Draw one standard normal number per group, equal for all its rows.

    Args:
        groups: Integer tensor of any shape.
        seed: Another seed gives independent numbers.

    Returns:
        float64 tensor of the shape of ``groups``.

    Example:
        >>> draws = group_normal(torch.arange(10_000))
        >>> round(draws.std().item(), 1), bool(draws.mean().abs() < 0.03)
        (1.0, True)
    """
    uniform = (positive(hash_groups(groups, seed=seed)).double() + 0.5) * 2.0**-63
    draws: Tensor = torch.special.ndtri(uniform.clamp(1e-15, 1 - 1e-15))
    return draws


def positive(hashed: Tensor) -> Tensor:
    """The upper 63 bits of hashed numbers, as non-negative numbers."""
    return _shifted(hashed, 1)


def _wrapped(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63  # wraps like int64 arithmetic


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's shift is arithmetic
