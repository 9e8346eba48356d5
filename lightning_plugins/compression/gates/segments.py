"""Sums over parts of a long vector: the same few operations for any number of parts."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Segments:
    """Sums over entries of a vector that belong together.

    The entries of every sum are gathered into a row of a table and added in a fixed order: unlike with an addition in
    place at repeated positions, a GPU finds the same sums every time.

    Args:
        targets: For every entry the number of its sum, or a number of at least ``count`` for none.
        count: The number of sums.

    Example:
        >>> Segments(torch.tensor([0, 0, 1, 2]), 2).sums(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor([3., 3.])
    """

    def __init__(self, targets: Tensor, count: int) -> None:
        targets = targets.cpu()
        places = (targets < count).nonzero()[:, 0]
        order = places[targets[places].argsort(stable=True)]
        sizes = torch.bincount(targets[places], minlength=count)
        widest = int(sizes.max()) if count else 0
        self._table = torch.full((count, widest), len(targets))  # the last: a zero that is appended
        self._table[torch.arange(widest) < sizes[:, None]] = order
        self._padded = bool((sizes < widest).any())

    def to(self, device: torch.device) -> "Segments":
        """Move the table.

        Args:
            device: Where to.

        Returns:
            This object.
        """
        self._table = self._table.to(device)
        return self

    def sums(self, entries: Tensor) -> Tensor:
        """Add up.

        Args:
            entries: A vector on the device of the table.

        Returns:
            The sums.
        """
        if self._padded:
            entries = torch.cat([entries, entries.new_zeros(1)])
        return entries[self._table].sum(1)


def numbers_of(sizes: Sequence[int]) -> Tensor:
    """The number of its part for every entry of a vector with parts of such sizes.

    Args:
        sizes: The sizes.

    Returns:
        Integers on the CPU.
    """
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))


class Means:
    """Means over the parts of a vector.

    Args:
        sizes: The sizes of the parts.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sums, self._sizes = Segments(numbers_of(sizes), len(sizes)), torch.tensor(sizes)

    def of(self, entries: Tensor) -> Tensor:
        """Compute them.

        Args:
            entries: A vector.

        Returns:
            The means.
        """
        self._sums, self._sizes = self._sums.to(entries.device), self._sizes.to(entries.device)
        return self._sums.sums(entries) / self._sizes
