"""Consistency checks between processes before their rows form one batch; exchanged with the row counts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from lightning_plugins.distributed import RankError, gather_integers, is_distributed

_PATIENCE = 10.0  # seconds within which ranks waiting at the exchange learn of a failed one
_FAILED, _NOWHERE = -1, -1


def agreed_counts(name: str, embeddings: Tensor, calls: int = 1) -> list[int]:
    """Exchange row counts; inconsistent ranks are reported before tensors of different shapes are exchanged.

    Args:
        name: The argument's name, for the message.
        embeddings: This rank's rows, of shape ``(N, d)``.
        calls: Number of batches that the ranks combine for one term in this step.

    Returns:
        The number of rows of every rank.

    Raises:
        ValueError: If the numbers of columns differ; raised on all ranks, so that none is left waiting.
        RankError: If a rank has withdrawn, combines another number of batches, or did not join.

    Example:
        >>> import torch
        >>> agreed_counts("embeddings", torch.ones(3, 2))
        [3]
    """
    found = gather_integers([*embeddings.shape, calls])
    counts, columns, batches = ([row[index] for row in found] for index in range(3))
    if _FAILED in counts:
        rank = counts.index(_FAILED)
        place = None if columns[rank] == _NOWHERE else columns[rank]
        raise RankError(f"rank {rank} failed in this step, and its own error says why", place)
    if len(set(columns)) > 1:
        raise ValueError(f"`{name}` must have as many columns on every rank, got {_by_rank(columns)}")
    if len(set(batches)) > 1:
        raise RankError(f"ranks must compute it equally often in a step, got {_by_rank(batches)}")
    return counts


def withdraw(place: int | None = None) -> None:
    """Tell the other ranks that this one has failed, in place of `agreed_counts`, so that they do not wait for it.

    They raise a `RankError` that names this rank. Call it before raising the error of this rank.

    Args:
        place: An index, such as that of a layer, reported to the other ranks in the error's ``place``.

    Example:
        >>> withdraw()  # of one rank alone: nobody to tell
    """
    if not is_distributed():
        return
    try:
        gather_integers([_FAILED, _NOWHERE if place is None else place, 0], patience=_PATIENCE)
    except RankError:  # no rank is waiting: raise the error of this rank
        return


@contextmanager
def refusals_are_told(scope: str) -> Iterator[None]:
    """Withdraw if this rank rejects its rows before the exchange.

    Args:
        scope: ``"global"`` if others wait, or ``"local"``.

    Raises:
        TypeError: The original error.
        ValueError: Likewise.
    """
    try:
        yield
    except (TypeError, ValueError):
        if scope == "global":
            withdraw()
        raise


def _by_rank(values: Sequence[int]) -> str:
    return ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
