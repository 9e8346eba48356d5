"""The masks of all parameters of a network, computed together once for every forward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_plugins.compression.gates.segments import Segments
from lightning_plugins.distributed import is_distributed


class SharedMasks:
    """Computes the factors of all masked parameters from one vector of masks, and hands each out once.

    A forward pass asks for one parameter after another. The first question is answered for all of them, with a few
    operations on long vectors instead of several on each of hundreds of short ones, which a GPU finishes faster than
    they can be started. A second question about the same parameter belongs to another use, which gets a graph of its
    own, and so does one after a backward pass, which has freed the graph.

    Parameters that are vectors, such as those of norms, are multiplied here, too. In a distributed training they are
    not: their gradients would come at the end of the backward pass all at once, and could not be sent meanwhile.

    Attributes:
        users: The parametrizations that apply the masks.
    """

    def __init__(self) -> None:
        self.users: list[Any] = []
        self._answers: dict[int, _Answer] = {}
        self._plans: dict[Any, _Plan] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a graph, or to a device."""
        return {"users": self.users, "_answers": {}, "_plans": {}}

    def answer(self, masks: Any, user: Any, weight: Tensor | None) -> "_Answer":
        """The factors of a parameter, or the masked parameter.

        Args:
            masks: The masks of the model.
            user: The parametrization that asks.
            weight: The parameter; None where only factors are wanted.

        Returns:
            The answer.
        """
        found = self._answers.pop(id(user), None)
        if found is None or not found.fits(user, weight):
            self._compute(masks)
            found = self._answers.pop(id(user))
        return found

    def values(self, masks: Any, user: Any) -> dict[int, Tensor]:
        """The factors of a parameter that is no vector, without gradients, left for who asks for them with gradients.

        Args:
            masks: The masks of the model.
            user: The parametrization that applies them.

        Returns:
            Factors by dimension.
        """
        found = self._answers.get(id(user))
        if found is None or found.versions != user.versions():
            self._compute(masks)
            found = self._answers[id(user)]
        return {dim: scale.detach() for dim, scale in found.scales.items()}

    def _compute(self, masks: Any) -> None:
        vectors = [] if is_distributed() else [user for user in self.users if user.multiplies_a_vector()]
        chosen = set(map(id, vectors))
        users = [user for user in self.users if id(user) not in chosen] + vectors
        device = masks.scores[0].device
        key = (device, tuple(map(id, users)), len(vectors))
        if key not in self._plans:
            self._plans = {key: _Plan(users, [len(scores) for scores in masks.scores], device)}
        plan, sources = self._plans[key], [user.source() for user in vectors]
        batch = _Batch(plan, masks.gate(), [scores._version for scores in masks.scores])
        scores = [] if masks.is_hard else list(masks.scores)
        batch.hard = masks.flat().detach() if masks.is_hard else None
        found = iter(_Spread.apply(batch, len(scores), *scores, *sources))
        state = _state()
        self._answers = {}
        for user in users[: len(users) - len(vectors)]:
            scales = {dim: next(found) for dim in user.dims}
            self._answers[id(user)] = _Answer(batch, state, user.versions(), scales)
        for user, source in zip(vectors, sources, strict=True):
            self._answers[id(user)] = _Answer(batch, state, user.versions(), {}, next(found), source, source._version)


@dataclass(eq=False)
class _Answer:
    """Factors of a parameter by dimension, or a masked vector, and when they are those to use."""

    batch: "_Batch"
    state: tuple[bool, ...]
    versions: Any
    scales: dict[int, Tensor]
    product: Tensor | None = None
    source: Tensor | None = None
    version: int = 0

    def fits(self, user: Any, weight: Tensor | None) -> bool:
        if self.batch.used or self.state != _state() or self.versions != user.versions():
            return False
        return self.source is None or (weight is self.source and weight._version == self.version)


def _state() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


@dataclass(eq=False)
class _Batch:
    """All factors of a forward pass: how masks come from scores, and whether a backward pass has been there."""

    plan: "_Plan"
    gate: Callable[[Tensor], Tensor]
    versions: list[int]
    hard: Tensor | None = None
    used: bool = False


class _Plan:
    """Positions of the factors of all parameters in the vector of all masks."""

    def __init__(self, users: Sequence[Any], sizes: Sequence[int], device: torch.device) -> None:
        self.sizes = list(sizes)
        total, offsets = sum(sizes), [0, *accumulate(sizes)]
        rows: list[list[Tensor]] = []
        for user in users:
            rows.extend(_levels(user, dim, offsets, total) for dim in user.dims)
        self.lengths = [len(row[0]) for row in rows]
        levels = []
        for level in range(max(map(len, rows))):
            nothing = [torch.full((length,), total) for length in self.lengths]
            levels.append(
                torch.cat([row[level] if level < len(row) else none for row, none in zip(rows, nothing, strict=True)])
            )
        self.sums = [Segments(level, total).to(device) for level in levels]
        self.levels = [level.to(device) for level in levels]

    def factors(self, flat: Tensor) -> list[Tensor]:
        """The masks in their order, one vector for every level: the product of these is wanted."""
        with_one = torch.cat([flat, flat.new_ones(1)])  # the last: units of no group
        return [with_one[level] for level in self.levels]

    def of_masks(self, grad: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """The gradient of the masks from that of the products."""
        found = []
        for place, sums in enumerate(self.sums):
            others = [factor for index, factor in enumerate(factors) if index != place]
            found.append(sums.sums(_product([grad, *others])))
        return sum(found[1:], start=found[0])


def _levels(user: Any, dim: int, offsets: Sequence[int], total: int) -> list[Tensor]:
    """Positions of the masks of one dimension; more than one level where a unit has several masks."""
    levels: list[Tensor] = []
    for index, units in user.groups_of(dim):
        places = torch.where(units >= 0, units + offsets[index], total)
        for level in levels:
            if bool(((level == total) | (places == total)).all()):
                level.copy_(torch.minimum(level, places))
                break
        else:
            levels.append(places)
    return levels


def _product(factors: Sequence[Tensor]) -> Tensor:
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    return product


class _Spread(Function):
    """Scores and vectors to the factors of all other parameters, and the masked vectors.

    What the backward pass needs is kept by the batch: saved tensors are counted by activation checkpointing, which
    computes a part of the network again and would ask for a batch at another place.
    """

    @staticmethod
    def forward(ctx: Any, batch: _Batch, count: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        scores, vectors = inputs[:count], inputs[count:]
        flat = batch.gate(torch.cat(scores)) if batch.hard is None else batch.hard
        factors = batch.plan.factors(flat)
        parts = torch.unsafe_split_with_sizes(_product(factors), batch.plan.lengths)
        own = len(parts) - len(vectors)
        scales = [part.to(vector.dtype) for part, vector in zip(parts[own:], vectors, strict=True)]
        ctx.set_materialize_grads(False)
        if batch.hard is not None:
            ctx.mark_non_differentiable(*parts[:own])
        ctx.batch, ctx.scores, ctx.vectors, ctx.scales, ctx.factors = batch, scores, vectors, scales, factors
        ctx.versions = [tensor._version for tensor in inputs]
        return (*parts[:own], *(torch._foreach_mul(vectors, scales) if vectors else ()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        batch, scores, vectors = ctx.batch, ctx.scores, ctx.vectors
        batch.used = True
        if ctx.versions != [tensor._version for tensor in (*scores, *vectors)]:
            raise RuntimeError("scores and masked parameters must not change between a forward and its backward pass")
        own = len(grads) - len(vectors)
        again = torch.is_grad_enabled()  # differentiated again: everything has to be a function of the inputs
        given, flat, factors, scales = None, None, ctx.factors, ctx.scales
        if scores:
            with torch.enable_grad():
                given = torch.cat(scores)
                given = given if again else given.detach().requires_grad_()
                flat = batch.gate(given)
            if again:
                factors = batch.plan.factors(flat)
                parts = _product(factors).split(batch.plan.lengths)[own:]
                scales = [part.to(vector.dtype) for part, vector in zip(parts, vectors, strict=True)]
        of_vectors, of_scales = _through(grads[own:], vectors, scales, with_scales=bool(scores))
        if given is None or flat is None:
            return None, None, *of_vectors
        missing = zip([*grads[:own], *of_scales], batch.plan.lengths, strict=True)
        products = [given.new_zeros(length) if one is None else one.to(given.dtype) for one, length in missing]
        of_flat = batch.plan.of_masks(torch.cat(products), factors)
        (of_scores,) = torch.autograd.grad(flat, given, of_flat, create_graph=again)
        return None, None, *of_scores.split(batch.plan.sizes), *of_vectors


def _through(
    grads: Sequence[Tensor | None], vectors: Sequence[Tensor], scales: Sequence[Tensor], *, with_scales: bool
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of vectors and of their factors; None where a product was not used."""
    of_vectors: list[Tensor | None] = [None] * len(grads)
    of_scales: list[Tensor | None] = [None] * len(grads)
    there = {place: grad for place, grad in enumerate(grads) if grad is not None}
    if there:
        given = list(there.values())
        for found, factors in ((of_vectors, scales), (of_scales, vectors if with_scales else ())):
            if factors:
                products = torch._foreach_mul(given, [factors[place] for place in there])
                for place, product in zip(there, products, strict=True):
                    found[place] = product
    return of_vectors, of_scales
