"""Rows with 64-bit keys in one float64 matrix: tables of groups and bounded samples, independent of row order."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_plugins.functional.folds import hash_groups


class KeyedRows(NamedTuple):
    """Rows and their keys.

    Attributes:
        keys: int64, shape ``(N,)``.
        rows: float64, shape ``(N, columns)``.
    """

    keys: Tensor
    rows: Tensor


def pack(keys: Tensor, rows: Tensor) -> Tensor:
    """Keys and rows in one flat float64 tensor; the bits of keys are preserved."""
    return torch.cat([keys.contiguous().view(torch.float64)[:, None], rows.double()], dim=1).flatten()


def unpack(blocks: Tensor | list[Tensor], columns: int) -> KeyedRows:
    """Inverse of `pack`, for one block or several."""
    flat = blocks if isinstance(blocks, Tensor) else torch.cat(blocks) if blocks else torch.empty(0).double()
    table = flat.double().view(-1, 1 + columns)
    return KeyedRows(table[:, 0].contiguous().view(torch.int64), table[:, 1:])


def sum_by_key(kept: KeyedRows) -> KeyedRows:
    """Sum the rows of each key; keys in ascending order."""
    keys, place = kept.keys.unique(return_inverse=True)
    sums = torch.zeros(len(keys), kept.rows.shape[1], dtype=torch.float64, device=kept.rows.device)
    return KeyedRows(keys, sums.index_add_(0, place, kept.rows))


def smallest(kept: KeyedRows, size: int, seed: int) -> KeyedRows:
    """A random sample of at most ``size`` rows, those with the smallest scrambled keys, independent of row order."""
    order = hash_groups(kept.keys, seed=seed).argsort(stable=True)[:size]
    return KeyedRows(kept.keys[order], kept.rows[order])
