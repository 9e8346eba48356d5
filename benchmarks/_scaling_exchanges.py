"""Exchanges of the callbacks that `scaling.py` measures, on paper."""

from dataclasses import dataclass
from typing import Literal

from lightning_plugins.regularizers.von_neumann import exchange_form

SINGLE, DOUBLE, INTEGER = 4, 8, 8  # bytes
HEADER = 144  # bytes of gloo's for a message
BATCHES = 12  # of a training

Kind = Literal["reduce", "gather", "send"]
# Exchanges without a callback, of numbers in float32.
PLAIN: dict[str, tuple[Kind, int]] = {
    "one summed": ("reduce", 1),
    "1,024 summed": ("reduce", 1024),
    "1,024 gathered": ("gather", 1024),
    "1,024 sent": ("send", 1024),
}


@dataclass(frozen=True)
class Size:
    """Sizes on which the exchanges depend.

    Attributes:
        rows: Rows of a process.
        width: Width of every layer.
        depth: Number of layers.
        processes: Number of processes.
    """

    rows: int
    width: int
    depth: int
    processes: int


@dataclass(frozen=True)
class Exchange:
    """A collective operation, with the algorithm that moves the fewest bytes.

    Attributes:
        kind: ``"reduce"``: a sum on all processes; ``"gather"``: a block of each on all; ``"send"``: from one to all.
        items: Numbers in the tensor of one process.
        item: Bytes of one of them.
        count: How often.
    """

    kind: Kind
    items: int
    item: int
    count: int = 1

    def received(self, processes: int) -> float:
        """Bytes a process receives without headers, mean over the processes."""
        share = {"reduce": 2 / processes, "gather": 1, "send": 1 / processes}[self.kind]
        return self.count * self.items * self.item * share * (processes - 1)

    def headers(self, processes: int) -> float:
        """Bytes of gloo's headers: it splits the blocks of rings in two, but never a number."""
        pieces = min(self.items, 2 * processes)
        messages = {"reduce": 2 * pieces / processes, "gather": 2, "send": 1 / processes}[self.kind]
        return self.count * messages * (processes - 1) * HEADER


Exchanges = list[Exchange]


def agreement(size: Size) -> Exchange:
    """Rows, columns and calls of every process, before a term of rows."""
    return Exchange("reduce", size.processes * 3, INTEGER, size.depth)


def counts(size: Size, times: int) -> Exchange:
    return Exchange("reduce", size.processes, INTEGER, times * size.depth)


def rows_of_all(size: Size) -> Exchange:
    return Exchange("gather", size.rows * size.width, SINGLE, size.depth)


def of_rows(size: Size) -> Exchanges:
    """For each layer the rows; three integers per process; the upstream gradient, one number."""
    return [agreement(size), rows_of_all(size), Exchange("reduce", 1, SINGLE, size.depth)]


def of_vne(size: Size) -> Exchanges:
    """For each layer the rows, or the `d x d` matrix in float64 if that is less; otherwise as for other terms."""
    if exchange_form(size.rows * size.processes, size.width, SINGLE) == "rows":
        return of_rows(size)
    matrix = Exchange("reduce", size.width**2, DOUBLE, size.depth)
    return [agreement(size), matrix, Exchange("reduce", 1, SINGLE, size.depth)]


def of_stable_rank(size: Size) -> Exchanges:
    """For each layer, from the process that computed it: value and scale, two vectors, nine tracked vectors."""
    numbers, vectors = (Exchange("send", items, SINGLE, 2 * size.depth) for items in (1, size.width))
    return [numbers, vectors, Exchange("send", 9 * size.width, SINGLE, size.depth)]


def of_gradients(size: Size) -> Exchanges:
    """For each layer the gradient and the value, from the process that computed them."""
    return [Exchange("send", items, SINGLE, size.depth) for items in (1, size.width**2)]


def of_cap(size: Size) -> Exchanges:
    """For each layer the norm and eight vectors, from the process that computed them."""
    return [Exchange("send", items, SINGLE, size.depth) for items in (1, 8 * size.width)]


def of_spectrum(size: Size) -> Exchanges:
    """For each layer the singular values in float64, from the process that computed them."""
    return [Exchange("send", size.width, DOUBLE, size.depth)]


def of_monitor(size: Size) -> Exchanges:
    """For each layer the Gram matrices of all processes, in float64."""
    return [Exchange("gather", size.width**2, DOUBLE, size.depth)]


def of_alarm(size: Size) -> Exchanges:
    """For each layer its Gram matrix in float64 and two integers per process; the values, one number per layer."""
    matrix = Exchange("reduce", size.width**2, DOUBLE, size.depth)
    return [counts(size, 2), matrix, Exchange("send", size.depth, DOUBLE)]


def of_alarm_queue(size: Size) -> Exchanges:
    """For each layer the rows and three integers per process; the values, one number per layer."""
    return [counts(size, 3), rows_of_all(size), Exchange("send", size.depth, DOUBLE)]


def of_probe(size: Size) -> Exchanges:
    """For each layer the sums of products of all processes, `(folds + 1) x (d + 3)^2` in float64."""
    return [Exchange("gather", 6 * (size.width + 3) ** 2, DOUBLE, size.depth)]


def of_pairs(size: Size) -> Exchanges:
    """For each layer the rows of the whole validation set."""
    return [Exchange("gather", BATCHES * size.rows * size.width, SINGLE, size.depth)]


def of_distance(size: Size) -> Exchanges:
    """The sum of the distances and the number of positions."""
    return [Exchange("reduce", 2, SINGLE)]


def of_maps(size: Size) -> Exchanges:
    """For each layer these two, and the gradient of the linear map to the teacher's `2 d` features."""
    return [Exchange("reduce", items, SINGLE, size.depth) for items in (2, 2 * size.width**2)]


def of_masks(size: Size) -> Exchanges:
    """The gradient of the scores, one per prunable channel, in one message."""
    return [Exchange("reduce", size.width * (size.depth - 1), SINGLE)]


def of_ranks(size: Size) -> Exchanges:
    """The gradient of the thresholds, one per layer, in one message."""
    return [Exchange("reduce", size.depth, SINGLE)]


def of_both(size: Size) -> Exchanges:
    """The gradients of scores and thresholds, in one message."""
    return [Exchange("reduce", size.width * (size.depth - 1) + size.depth, SINGLE)]
