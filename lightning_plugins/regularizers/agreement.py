"""Properties that processes must agree on before their rows form one batch; sent with the numbers of rows."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from lightning_plugins.distributed import RankError, gather_integers, is_distributed

_PATIENCE = 10.0  # seconds in which ranks that wait at the exchange surely hear of one that fails
_FAILED, _NOWHERE = -1, -1


def agreed_counts(name: str, embeddings: Tensor, calls: int = 1) -> list[int]:
    """Exchange the numbers of rows; a rank that does something else is named before tensors of other shapes meet.

    Args:
        name: The argument's name, for the message.
        embeddings: This rank's rows, of shape ``(N, d)``.
        calls: How many batches the ranks put together for one purpose in this step.

    Returns:
        The number of rows of every rank.

    Raises:
        ValueError: If ranks have another number of columns; on all ranks alike, so that none is left waiting.
        RankError: If a rank has withdrawn, puts together another number of batches, or did not come.

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
    """Tell the other ranks, in place of `agreed_counts`, that this one has failed, so that none is left waiting for it.

    They raise `RankError`, which names this rank. Call it before the error of this rank is raised.

    Args:
        place: An index, such as a layer's, that the other ranks find in the error's ``place``.

    Example:
        >>> withdraw()  # of one rank alone: nobody to tell
    """
    if not is_distributed():
        return
    try:
        gather_integers([_FAILED, _NOWHERE if place is None else place, 0], patience=_PATIENCE)
    except RankError:  # nobody is waiting: the error of this rank is the one to raise
        return


@contextmanager
def refusals_are_told(scope: str) -> Iterator[None]:
    """Withdraw where this rank refuses its rows before the exchange.

    Args:
        scope: ``"global"`` where others wait, or ``"local"``.

    Raises:
        TypeError: The refusal, as it came.
        ValueError: In the same way.
    """
    try:
        yield
    except (TypeError, ValueError):
        if scope == "global":
            withdraw()
        raise


def _by_rank(values: Sequence[int]) -> str:
    return ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
