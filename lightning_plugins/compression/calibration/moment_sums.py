"""Sums of ``x xᵀ`` over the rows that layers receive; layers that receive one tensor share one sum."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_instance
from lightning_plugins.compression.calibration.masking import RowIndex
from lightning_plugins.compression.calibration.rows import rows_of, take, width
from lightning_plugins.compression.low_rank.splittable import Layer
from lightning_plugins.compression.low_rank.transposed import as_linear


class _Sum:
    """One sum.

    Attributes:
        total: The sum of ``x xᵀ``.
        rows: The number of rows.
        members: The layers whose sum it is.
    """

    def __init__(self, total: Tensor, rows: int, members: Sequence[str]) -> None:
        self.total, self.rows, self.members = total, rows, set(members)

    def add(self, matrices: Sequence[Tensor], weight: float, rows: int) -> None:
        with torch.autocast(self.total.device.type, enabled=False):
            for matrix in matrices:
                self.total.addmm_(matrix.T, matrix, alpha=weight)
        self.rows += rows


class _Event(NamedTuple):
    """A tensor that layers received one after the other, and the rows that were taken from it.

    Attributes:
        given: The tensor.
        version: How often it had been changed in place.
        fraction: The part of its rows that was taken.
        matrices: The rows.
        weight: What each row stands for.
        rows: The number of rows that they stand for.
        names: The layers.
    """

    given: Tensor
    version: int | None
    fraction: float
    matrices: list[Tensor]
    weight: float
    rows: int
    names: list[str]


class MomentSums:
    """The sums of some layers while a model runs.

    The query, key and value of an attention receive the same tensor: as long as they do, their sum is computed once.

    Args:
        layers: The layers by name.
        effort: What the sums may cost, as a fraction of the layers' own multiplications; None for all rows.
    """

    def __init__(self, layers: Mapping[str, Layer], effort: float | None) -> None:
        self.layers = dict(layers)
        self._fractions = {name: _fraction(layer, effort) for name, layer in layers.items()}
        self._sums: dict[str, _Sum] = {}
        self._event: _Event | None = None

    def start(self, name: str, total: Tensor, rows: int) -> None:
        """Go on from a sum that is known."""
        self._sums[name] = _Sum(total, rows, [name])

    def add(self, name: str, given: Tensor, index: RowIndex) -> None:
        """Add the inputs of a layer.

        Args:
            name: The layer's name.
            given: Its input.
            index: The rows that count.
        """
        fraction, event = self._fractions[name], self._event
        if event is not None and name not in event.names and event.fraction == fraction and _is_same(event, given):
            event.names.append(name)
            return
        self.flush()
        layer = self.layers[name]
        check_instance("batches", given, Tensor, f"batches from which layer {name!r} gets a tensor")
        rows = rows_of(layer, given.detach())
        where = index.rows(name, rows.places, given.device)
        count = torch.Size(rows.places).numel() if where is None else len(where)
        if count == 0:
            return
        sample = index.sample(count, fraction)
        if sample is not None:
            sample = sample.pin_memory() if given.is_cuda else sample  # otherwise the copy waits
            sample = sample.to(given.device, non_blocking=True)
            where = sample if where is None else where[sample]
        weight = 1.0 if sample is None else count / len(sample)
        dtype = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
        cut = (matrix.to(dtype) for matrix in take(rows, where))
        if isinstance(layer, nn.Conv1d | nn.Conv2d):  # patches: some at a time, and no two layers share them
            for matrix in cut:
                self._sum(name).add([matrix], weight, 0)
            self._sum(name).rows += count
            return
        # A copy, for the model may change its tensor in place before the next layer is called.
        matrices = [matrix.clone() if matrix.data_ptr() == given.data_ptr() else matrix for matrix in cut]
        self._event = _Event(given, _version(given), fraction, matrices, weight, count, [name])

    def flush(self) -> None:
        """Add pending rows."""
        event, self._event = self._event, None
        if event is None:
            return
        new = [name for name in event.names if name not in self._sums]
        if new:
            made = self._zeros(new[0], new)
            self._sums |= dict.fromkeys(new, made)
        for one in {id(self._sums[name]): self._sums[name] for name in event.names}.values():
            here = [name for name in event.names if self._sums[name] is one]
            if set(here) != one.members:  # the others did not receive this one
                one.members -= set(here)
                one = _Sum(one.total.clone(), one.rows, here)
                self._sums |= dict.fromkeys(here, one)
            one.add(event.matrices, event.weight, event.rows)

    def result(self) -> dict[str, tuple[Tensor, int]]:
        """The sums and numbers of rows by layer; zeros for one that was never called. Layers may share a tensor."""
        self.flush()
        return {name: (self._sum(name).total, self._sum(name).rows) for name in self.layers}

    def _sum(self, name: str) -> _Sum:
        if name not in self._sums:
            self._sums[name] = self._zeros(name, [name])
        return self._sums[name]

    def _zeros(self, name: str, members: Sequence[str]) -> _Sum:
        weight, size = self.layers[name].weight, width(self.layers[name])
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return _Sum(torch.zeros(size, size, dtype=dtype, device=weight.device), 0, members)


def _fraction(layer: Layer, effort: float | None) -> float:
    """The part of a layer's rows to take: the product of a row with itself costs ``d * d``, the layer's ``d * out``."""
    return 1.0 if effort is None else min(1.0, effort * len(as_linear(layer).weight) / width(layer))


def _version(given: Tensor) -> int | None:
    return None if given.is_inference() else given._version


def _is_same(event: _Event, given: Tensor) -> bool:
    return given is event.given and event.version is not None and event.version == _version(given)
