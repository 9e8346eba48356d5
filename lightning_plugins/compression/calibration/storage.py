"""Devices on which moments are kept, and the memory they need."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_plugins._checks import check_finite_number, check_fraction, check_positive_int
from lightning_plugins.compression.calibration.rows import width
from lightning_plugins.compression.low_rank.splittable import Layer
from lightning_plugins.distributed import sum_over_ranks


class Files:
    """Sums in files of a temporary folder, which goes with this object."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0

    def keep(self, found: Mapping[str, tuple[Tensor, int]]) -> dict[str, tuple[Tensor | Path, int]]:
        """Write sums into files.

        Args:
            found: Sums and numbers of rows by layer name.

        Returns:
            The files in the place of the sums.
        """
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="calibration-")
        kept: dict[str, tuple[Tensor | Path, int]] = {}
        for name, (total, rows) in found.items():
            path = Path(self._folder.name, f"{self._count}.pt")
            torch.save(total, path)
            kept[name], self._count = (path, rows), self._count + 1
        return kept


def check_options(damping: float, effort: float | None) -> None:
    """Check the numbers that a calibration takes.

    Args:
        damping: As for `Calibration`.
        effort: As for `Calibration`.

    Raises:
        TypeError: If one is not a number.
        ValueError: If ``damping`` is not in (0, 1], or ``effort`` not more than 0.

    Example:
        >>> check_options(0.01, None)
    """
    if check_fraction("damping", damping) == 0:
        raise ValueError("`damping` must be more than 0, got 0; 1e-6 is almost none")
    if effort is not None and check_finite_number("effort", effort) <= 0:
        raise ValueError(f"`effort` must be more than 0, or None to use all rows, got {effort!r}")


def moment_bytes(layer: Layer) -> int:
    """The memory that the moment of a layer's inputs takes.

    Args:
        layer: The layer.

    Returns:
        Bytes.

    Example:
        >>> moment_bytes(torch.nn.Linear(10, 3))
        400
    """
    return width(layer) ** 2 * (8 if layer.weight.dtype == torch.float64 else 4)


def parts_within(sizes: Mapping[str, int], memory: int) -> list[list[str]]:
    """Share the layers out, in order, such that none of the parts takes more than ``memory``.

    Args:
        sizes: Bytes by layer name.
        memory: The most bytes of a part.

    Returns:
        The names of each part.

    Raises:
        ValueError: If one layer alone takes more.
        TypeError: If ``memory`` is not an int.

    Example:
        >>> parts_within({"a": 3, "b": 2, "c": 2}, 5)
        [['a', 'b'], ['c']]
    """
    check_positive_int("memory", memory)
    largest = max(sizes, key=lambda name: sizes[name])
    if sizes[largest] > memory:
        raise ValueError(
            f"`memory` must hold the moment of {largest!r}, which takes {sizes[largest]} bytes, got {memory}"
        )
    parts: list[list[str]] = [[]]
    left = memory
    for name, size in sizes.items():
        if size > left:
            parts.append([])
            left = memory
        parts[-1].append(name)
        left -= size
    return parts


def loaded(total: Tensor | Path) -> Tensor:
    """A sum that is in memory or in a file.

    Args:
        total: The sum, or its file.

    Returns:
        The sum.
    """
    if isinstance(total, Tensor):
        return total
    loaded: Tensor = torch.load(total, weights_only=True)
    return loaded


def over_processes(total: Tensor, rows: int) -> tuple[Tensor, int]:
    """Add a sum and its number of rows up over all processes.

    Args:
        total: The sum of this process.
        rows: Its number of rows.

    Returns:
        Those of all.
    """
    count = torch.tensor(float(rows), dtype=torch.float64, device=total.device)  # exact up to 2 ** 53
    return sum_over_ranks(total), int(sum_over_ranks(count))
