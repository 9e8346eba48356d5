"""The stable rank of weights as a callback for training loops that already exist."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_plugins.callbacks.weight_regularization import WeightRegularization
from lightning_plugins.computed_weights import parametrizations_at_rest
from lightning_plugins.functional.stable_rank import (
    check_power,
    exact_gradient,
    followed_nuclear_term,
    followed_term,
)
from lightning_plugins.functional.subspace import top_singular_subspace
from lightning_plugins.regularizers import StableRank
from lightning_plugins.schedules import Schedule
from lightning_plugins.weights import WeightMatrix, check_rank, select_targets

# Where the estimated error of a gradient is larger, the weight is decomposed anew. The estimate is cautious: on weights
# that change fast it was found to be one to four times the error.
_ERROR = 0.02
_PRODUCTS_FROM = 64  # rows and columns, on an accelerator


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
            On a GPU 1 follows them too, for weights with 64 rows and columns or more, and takes the sum of all singular
            values from products; those below 1e-3 of the Frobenius norm then pull the less the smaller they are.
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

    def _term(self, weight: WeightMatrix, matrix: Tensor) -> tuple[Tensor, ...]:
        """Value and gradient, whole or in parts, and the tracked vectors, if any."""
        rank, p = self._rank_and_power(weight)
        count = self._followed(weight, matrix)
        if not count:
            return exact_gradient(matrix, rank, p)
        start = self._starts.get(weight.label)
        if start is None or start.shape != (*matrix.shape[:-2], min(matrix.shape[-2:]), count):
            start = top_singular_subspace(matrix, count).start
        if p == 1:
            return followed_nuclear_term(matrix, rank, start.to(matrix.device))
        term = followed_term(matrix, rank, start.to(matrix.device))
        if matrix.is_cpu and bool((term.error > _ERROR).any()):  # on other devices this check would synchronise
            term = followed_term(matrix, rank, top_singular_subspace(matrix, count).start)
        return term[:-1]

    def _empty(self, weight: WeightMatrix, matrix: Tensor) -> tuple[Tensor, ...]:
        dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
        rank, p = self._rank_and_power(weight)
        count, batch, sides = self._followed(weight, matrix), matrix.shape[:-2], sorted(matrix.shape[-2:])
        in_parts = count and p == 2
        shapes = [(1, 1), (sides[0], rank), (rank, sides[1])] if in_parts else [tuple(matrix.shape[-2:])]
        if count:
            shapes.append((sides[0], count))
        return tuple(matrix.new_empty((*batch, *shape), dtype=dtype) for shape in [(), *shapes])

    def _followed(self, weight: WeightMatrix, matrix: Tensor) -> int:
        """Return the number of vectors to follow; 0 where a decomposition at each step costs no more."""
        # The error of the last vector wanted shrinks the faster, the more stand behind it. After many steps a weight is
        # no longer where its vectors were left.
        rank, p = self._rank_and_power(weight)
        count = rank + max(8, rank // 4)
        pays = p == 2 or _takes_products(matrix)
        return count if pays and count <= min(matrix.shape[-2:]) // 2 and self.every_n_steps <= 4 else 0

    def _rank_and_power(self, weight: WeightMatrix) -> tuple[int, Literal[1, 2]]:
        """A stable rank is, up to 1, what lies beyond rank 1 in squares."""
        rank = self._ranks[weight.label]
        return (1, 2) if rank is None else (rank, self.p)


def _takes_products(matrix: Tensor) -> bool:
    """Return whether products are faster than a decomposition of the Gram matrix, which leaves an accelerator idle."""
    return matrix.is_cuda and min(matrix.shape[-2:]) >= _PRODUCTS_FROM
