"""The stable rank of weights as a callback for training loops that already exist."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_plugins._lightning import LightningModule
from lightning_plugins.callbacks._terms.weight_batches import (
    WeightBatch,
    add_gradients,
    computed_in_batches,
    in_rounds,
    joined,
    of_each_weight,
)
from lightning_plugins.callbacks.weight_regularization import WeightRegularization
from lightning_plugins.computed_weights import parametrizations_at_rest
from lightning_plugins.functional.followed_terms import followed_nuclear_terms, followed_rank_terms
from lightning_plugins.functional.stable_rank import check_power, exact_gradient, followed_term, whole_gradient
from lightning_plugins.functional.subspace import top_singular_subspace
from lightning_plugins.regularizers import StableRank
from lightning_plugins.schedules import Schedule
from lightning_plugins.weights import WeightMatrix, check_rank, select_targets

# Where the estimated error of a gradient is larger, the weight is decomposed anew. The estimate is cautious: on weights
# that change fast it was found to be one to four times the error.
_ERROR = 0.02
_FOLLOWED = 4  # after more steps than these a weight is no longer where its vectors were left


class StableRankRegularization(WeightRegularization):
    """Drive weights towards a low rank during training, with no change to the model.

    Without ``rank`` the term of a layer is ``weight * SR``, with ``SR`` the stable rank: the squared Frobenius norm
    over the squared spectral norm. With ``rank`` it is ``weight * mSR``: the sum of ``s ** p`` over the singular values
    after the ``rank`` largest, divided by that over the ``rank`` largest. The terms of the layers are summed. They do
    not depend on the scale of a weight, so keep weight decay on.

    The gradient is a closed form that is added once an optimizer step, however many batches are accumulated: after the
    processes' gradients were averaged and an fp16 scaler undone, before clipping. The layers are shared out over them
    and the gradients exchanged. It works for manual optimization too. The loss that is logged is without the term. A
    weight that has no gradient at a step (frozen, or not used) gets none from the term either. One that is computed by
    a parametrization, a norm or pruning passes the gradient on to the parameters it is computed from.

    Args:
        layers: Dotted name of a layer, a glob over names, or several of them. Among the matches of a glob the linear
            layers, the convolutions and the projections of ``nn.MultiheadAttention`` are taken; each group of a grouped
            convolution is a matrix of its own, whose terms are summed.
        weight: Positive to lower the stable rank, negative to raise it.
        rank: The rank aimed at: a fraction (a float between 0 and 1) of each matrix's smaller side, one number for all
            (matrices that are not larger have no tail and are passed over), a mapping from the layers' names to
            numbers, or None for the stable rank, which aims at 1.
        p: With ``rank``: 1 drives the singular values beyond it to zero, 2 lowers them. 1 decomposes the smaller Gram
            matrix of each weight; 2, as ``rank=None``, follows the leading singular vectors from step to step instead
            where that is cheaper. On a CPU a weight whose gradient would be off by more than about 1 % is decomposed.
            On a GPU no step after the first waits for the device: 1 follows them too, and takes the sum of all singular
            values from products; those below 1e-3 of the Frobenius norm then pull the less the smaller they are. Only
            with ``every_n_steps`` above 4 each application decomposes, which waits.
        scheme: How a convolution's kernel becomes a matrix: 1 for ``O x (I * k * k)``, 2 for ``(O * k) x (I * k)``.
        schedule: Factor on ``weight`` as a function of training progress (`lightning_plugins.schedules`).
        every_n_steps: Only every n-th step of an optimizer carries the term, then n times as strong.
        on_nonfinite: ``"skip"`` leaves out a term that is NaN or infinite, with one warning and a count in the log;
            ``"raise"`` raises `FloatingPointError`, which costs a synchronisation with the device at every step.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of the wrong type.

    Logs ``stable_rank/<layer>``, the ``SR`` or ``mSR`` of each layer, and ``stable_rank/penalty``, the sum of the terms
    of all such callbacks in a batch, at every step that carries them, and ``stable_rank/skipped`` once a term had to be
    left out. The weights that are taken, and those that are passed over, are named at the start.

    Example:
        >>> callback = StableRankRegularization(layers="backbone.*", weight=0.01, rank=0.25)
        >>> callback.rank
        0.25

    Source:
        Our reading of Eo et al., https://arxiv.org/abs/2111.15179, for ``mSR``. Following the singular vectors
        is ours.
    """

    def __init__(
        self,
        layers: str | list[str],
        weight: float,
        *,
        rank: int | float | dict[str, int] | None = None,
        p: Literal[1, 2] = 1,
        scheme: Literal[1, 2] = 1,
        schedule: Schedule | None = None,
        every_n_steps: int = 1,
        on_nonfinite: Literal["skip", "raise"] = "skip",
    ) -> None:
        super().__init__(
            layers,
            # The term itself; here it is computed from tracked singular vectors where that is cheaper.
            StableRank(),
            weight,
            name="stable_rank",
            scheme=scheme,
            schedule=schedule,
            every_n_steps=every_n_steps,
            on_nonfinite=on_nonfinite,
        )
        self.rank = check_rank(rank)
        self.p: Literal[1, 2] = check_power(p)
        self._ranks: dict[str, int | None] = {}  # per matrix
        self._starts: dict[str, Tensor] = {}  # tracked vectors per matrix

    @property
    def state_key(self) -> str:
        """Unique for every different instance, so that several keep their own entries in a checkpoint."""
        return self._generate_state_key(
            layers=self.layers,
            weight=self.weight,
            rank=self.rank,
            p=self.p,
            scheme=self.scheme,
            schedule=repr(self.schedule),
            every_n_steps=self.every_n_steps,
        )

    def state_dict(self) -> dict[str, Any]:
        """The tracked vectors, the steps of each optimizer, and the count of skipped terms."""
        return {"starts": {label: start.clone() for label, start in self._starts.items()}, **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's vectors and counts."""
        self._starts = dict(state_dict["starts"])
        super().load_state_dict(state_dict)

    _instead_of_lbfgs = "`StableRankMixin`"

    def _find(self, model: nn.Module, layers: Sequence[str]) -> list[WeightMatrix]:
        with parametrizations_at_rest(model):
            targets = select_targets(model, layers, rank=self.rank, scheme=self.scheme, computed=True)
        self._ranks = {weight.label: rank for weight, rank in targets}
        return [weight for weight, _ in targets]

    def _forget(self, weights: list[WeightMatrix] | None = None) -> None:
        """Vectors that are not tracked become outdated: start afresh afterwards."""
        for label in list(self._starts) if weights is None else [weight.label for weight in weights]:
            self._starts.pop(label, None)

    def _received(self, weight: WeightMatrix, parts: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        value = parts[0].sum() + (self._ranks[weight.label] is None) * parts[0].numel()  # of all groups; a stable
        if len(parts) > 2:  # rank is 1 more than what lies beyond rank 1
            parts, self._starts[weight.label] = parts[:-1], parts[-1]
        return value, parts[1:]

    def _add(self, pl_module: LightningModule, weights: list[WeightMatrix], factor: float, scaler: Any) -> None:
        if not in_batches(weights[0].tensor) or self.every_n_steps > _FOLLOWED:
            super()._add(pl_module, weights, factor, scaler)
            return
        values: dict[str, Tensor] = {}
        for batches in in_rounds(weights, self._rank_and_count):
            found = computed_in_batches(batches, self._terms, self._buffers)
            present = [weight.label for batch in batches for weight in batch.weights]
            starts = [start for batch, parts in zip(batches, found, strict=True) for start in batch.each(parts[-1])]
            self._starts.update(zip(present, starts, strict=True))
            of_matrices = torch.cat([parts[0] for parts in found]) + (self.rank is None)  # 1 more than beyond rank 1
            of_weights = of_each_weight(batches, of_matrices)
            gradients = [_gradient(batch, parts) for batch, parts in zip(batches, found, strict=True)]
            add_gradients(batches, gradients, factor, scaler, wanted=of_weights.isfinite())
            values.update(zip(present, of_weights.unbind(), strict=True))
        self._log(pl_module, {weight.label: values[weight.label] for weight in weights}, factor)

    def _rank_and_count(self, weight: WeightMatrix) -> tuple[int, int]:
        """The rank, and the number of vectors to follow on an accelerator: all of a small matrix, without a wait."""
        rank, _ = self._rank_and_power(weight)
        side, count = min(weight.shape[-2:]), _followed_for(rank)
        return rank, count if count <= side // 2 else side

    def _terms(self, batches: Sequence[WeightBatch]) -> list[tuple[Tensor, ...]]:
        """Values, gradients in parts or whole, and tracked vectors of each batch, to be sent to all processes."""
        alike: dict[Any, list[int]] = {}
        for index, batch in enumerate(batches):
            alike.setdefault((batch.kind, batch.matrices.dtype), []).append(index)
        found: dict[int, tuple[Tensor, ...]] = {}
        for ((rank, count), _), indices in alike.items():
            matrices = [batches[index].matrices for index in indices]
            starts = [self._joined_starts(batches[index], count) for index in indices]
            _, p = self._rank_and_power(batches[indices[0]].weights[0])
            terms = (followed_nuclear_terms if p == 1 else followed_rank_terms)(matrices, rank, starts)
            found.update(zip(indices, terms, strict=True))
        return [found[index] for index in range(len(batches))]

    def _joined_starts(self, batch: WeightBatch, count: int) -> Tensor:
        starts = [
            self._start(weight.label, matrix, count)
            for weight, matrix in zip(batch.weights, batch.each(batch.matrices), strict=True)
        ]
        return joined(starts).reshape(len(batch.matrices), -1, count)

    def _buffers(self, batch: WeightBatch) -> tuple[Tensor, ...]:
        """Buffers to receive an entry of `_terms` into."""
        (rank, count), matrices = batch.kind, batch.matrices
        short, long = sorted(matrices.shape[-2:])
        _, p = self._rank_and_power(batch.weights[0])
        shapes = [tuple(matrices.shape[-2:])] if p == 1 else [(1, 1), (short, rank), (rank, long)]
        return tuple(matrices.new_empty((len(matrices), *shape)) for shape in [(), *shapes, (short, count)])

    def _start(self, label: str, matrix: Tensor, count: int) -> Tensor:
        """The vectors of the step before, or exact ones to begin with."""
        start = self._starts.get(label)
        if start is None or start.shape != (*matrix.shape[:-2], min(matrix.shape[-2:]), count):
            return top_singular_subspace(matrix, count).start
        return start.to(matrix.device)

    def _term(self, weight: WeightMatrix, matrix: Tensor) -> tuple[Tensor, ...]:
        """Value and gradient, whole or in parts, and the tracked vectors, if any."""
        rank, p = self._rank_and_power(weight)
        count = self._followed(weight, matrix)
        if not count:
            return exact_gradient(matrix, rank, p)
        term = followed_term(matrix, rank, self._start(weight.label, matrix, count))
        if bool((term.error > _ERROR).any()):
            term = followed_term(matrix, rank, top_singular_subspace(matrix, count).start)
        return term[:-1]

    def _empty(self, weight: WeightMatrix, matrix: Tensor) -> tuple[Tensor, ...]:
        dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
        rank, _ = self._rank_and_power(weight)
        count, batch, sides = self._followed(weight, matrix), matrix.shape[:-2], sorted(matrix.shape[-2:])
        in_parts = [(1, 1), (sides[0], rank), (rank, sides[1]), (sides[0], count)]
        shapes = in_parts if count else [tuple(matrix.shape[-2:])]
        return tuple(matrix.new_empty((*batch, *shape), dtype=dtype) for shape in [(), *shapes])

    def _followed(self, weight: WeightMatrix, matrix: Tensor) -> int:
        """Return the number of vectors to follow; 0 where a decomposition at each step costs no more."""
        rank, p = self._rank_and_power(weight)
        count = _followed_for(rank)
        return count if p == 2 and count <= min(matrix.shape[-2:]) // 2 and self.every_n_steps <= _FOLLOWED else 0

    def _rank_and_power(self, weight: WeightMatrix) -> tuple[int, Literal[1, 2]]:
        """A stable rank is, up to 1, what lies beyond rank 1 in squares."""
        rank = self._ranks[weight.label]
        return (1, 2) if rank is None else (rank, self.p)


def in_batches(weight: Tensor) -> bool:
    """Return whether to compute terms in batches and without a wait, and not each with a check of its error."""
    return not weight.is_cpu


def _followed_for(rank: int) -> int:
    """The number of vectors to follow: the more stand behind the last one wanted, the faster its error shrinks."""
    return rank + max(8, rank // 4)


def _gradient(batch: WeightBatch, parts: tuple[Tensor, ...]) -> Tensor:
    """The gradient with respect to the matrices of a batch, from an entry of `_terms`."""
    _, *gradient, _ = parts  # between the value and the vectors
    return gradient[0] if len(gradient) == 1 else whole_gradient(batch.matrices, *gradient)
