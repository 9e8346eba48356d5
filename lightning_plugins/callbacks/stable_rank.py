"""The stable rank of weights as a callback for training loops that already exist."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_plugins._checks import check_choice, check_finite_number, check_positive_int
from lightning_plugins._lightning import Callback, LightningModule, MisconfigurationException, Trainer, rank_zero_warn
from lightning_plugins.callbacks._terms.logged import claim_names, log_sum, log_value, release_names
from lightning_plugins.callbacks._terms.nonfinite import NonfiniteGuard
from lightning_plugins.callbacks._terms.weight_gradients import add_gradient, scaler_of_fused, shared_out
from lightning_plugins.callbacks._terms.weights_in_use import WeightsInUse
from lightning_plugins.callbacks._trainer.progress import training_progress
from lightning_plugins.callbacks._trainer.requirements import (
    makes_layers_late,
    require_known_total,
    require_lightning_module,
    require_supported_strategy,
)
from lightning_plugins.computed_weights import parametrizations_at_rest
from lightning_plugins.functional.stable_rank import (
    check_power,
    exact_gradient,
    followed_nuclear_term,
    followed_term,
)
from lightning_plugins.functional.subspace import top_singular_subspace
from lightning_plugins.schedules import Schedule
from lightning_plugins.selection import check_layers
from lightning_plugins.weights import Target, check_rank, check_scheme, select_targets

# Where the estimated error of a gradient is larger, the weight is decomposed anew. The estimate is cautious: on weights
# that change fast it was found to be one to four times the error.
_ERROR = 0.02
_PRODUCTS_FROM = 64  # rows and columns, on an accelerator


class StableRankRegularization(Callback):
    """Press weights towards a low rank during training, with no change to the model.

    Without ``rank`` the term of a layer is ``weight * SR``, with ``SR`` the stable rank: the squared Frobenius norm
    over the squared spectral norm. With ``rank`` it is ``weight * mSR``: the sum of ``s ** p`` over the singular values
    after the ``rank`` largest, divided by that over the ``rank`` largest. The terms of the layers are summed. They do
    not depend on the scale of a weight, so keep weight decay on.

    The gradient is a closed form that is added once an optimizer step, however many batches are accumulated: after the
    ranks' gradients were averaged and an fp16 scaler undone, before clipping. The layers are shared out over the ranks
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
    left out. Which weights are taken, and which are passed over, is said at the start.

    Example:
        >>> callback = StableRankRegularization(layers="backbone.*", weight=0.01, rank=0.25)
        >>> callback.rank
        0.25

    Source:
        Our reading of Eo et al., https://arxiv.org/abs/2111.15179, for ``mSR``. Following the singular vectors is ours.
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
        super().__init__()
        self.layers = check_layers(layers, sides=False)
        self.weight = check_finite_number("weight", weight)
        self.rank = check_rank(rank)
        self.p: Literal[1, 2] = check_power(p)
        self.scheme: Literal[1, 2] = check_scheme(scheme)
        self.schedule = schedule
        self.every_n_steps = check_positive_int("every_n_steps", every_n_steps)
        self._guard = NonfiniteGuard("stable_rank", check_choice("on_nonfinite", on_nonfinite, ("skip", "raise")))
        self._starts: dict[str, Tensor] = {}  # per matrix, the vectors that the next step goes on from
        self._steps: dict[int, int] = {}  # per optimizer, the steps seen
        self._in_use = WeightsInUse(type(self).__name__, self.layers, self._select, lambda target: target.weight)
        self._frozen = False  # whether a warning was given that nothing is trained

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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module and the Trainer, and find the weights."""
        if stage != "fit":
            return
        name = type(self).__name__
        require_lightning_module(name, pl_module)
        require_supported_strategy(name, trainer)
        require_known_total(name, self.schedule, trainer)
        if trainer.global_step == 0:  # a new training; a checkpoint's state comes after this hook
            self._starts.clear()
            self._steps.clear()
        self._frozen = False
        if not makes_layers_late(pl_module):
            self._in_use.find(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find weights that were made only now, and check that an optimizer trains some."""
        targets = self._in_use.find(pl_module)
        self._in_use.tell(pl_module)
        self._check_trained(trainer, targets)
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
            raise MisconfigurationException(
                f"{type(self).__name__} adds a gradient without a loss, and LBFGS compares losses; use another "
                "optimizer, or `StableRankMixin`, whose term is part of the loss"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module, to which nothing was done."""
        self._in_use.forget()
        release_names(pl_module, self)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the module: ``teardown`` does not run after an exception."""
        self.teardown(trainer, pl_module, stage="fit")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the terms' gradients to those of the weights that this optimizer trains."""
        index = next(i for i, known in enumerate(trainer.optimizers) if known is optimizer)
        step = self._steps.get(index, 0)
        self._steps[index] = step + 1
        trained = {id(parameter) for parameter in _parameters(optimizer) if parameter.requires_grad}
        present = self._in_use.now(pl_module)
        targets = [t for t in present if any(id(source) in trained for source in t.weight.sources)]
        if not targets or step % self.every_n_steps:
            return
        factor = self.weight * self.every_n_steps * self._factor(trainer)
        if factor == 0:
            for weight, _ in targets:  # vectors that nobody follows fall behind: start afresh afterwards
                self._starts.pop(weight.label, None)
            return
        with torch.no_grad(), parametrizations_at_rest(pl_module):
            self._add(pl_module, targets, factor, scaler_of_fused(trainer, optimizer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say once if terms were left out, when the loggers look at the device anyway."""
        self._guard.report(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say once if terms were left out."""
        self._guard.warn_once()

    def state_dict(self) -> dict[str, Any]:
        """The vectors that are followed, the steps of each optimizer, and the count of terms left out."""
        return {
            "starts": {label: start.clone() for label, start in self._starts.items()},
            "steps": dict(self._steps),
            "skipped": self._guard.skipped(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's vectors and counts."""
        self._starts = dict(state_dict["starts"])
        self._steps = dict(state_dict["steps"])
        self._guard.restore(state_dict["skipped"])

    def _select(self, model: nn.Module, layers: Sequence[str]) -> list[Target]:
        with parametrizations_at_rest(model):
            return select_targets(model, layers, rank=self.rank, scheme=self.scheme, computed=True)

    def _check_trained(self, trainer: Trainer, targets: list[Target]) -> None:
        """Refuse weights that no optimizer trains; frozen ones may be thawed by another callback."""
        sources = [source for target in targets for source in target.weight.sources]
        optimized = {id(parameter) for optimizer in trainer.optimizers for parameter in _parameters(optimizer)}
        if any(id(source) in optimized and source.requires_grad for source in sources):
            return
        labels = ", ".join(target.weight.label for target in targets[:5])
        rule = f"`layers`: an optimizer must train at least one of {labels}; none does"
        if all(source.requires_grad for source in sources):
            raise MisconfigurationException(rule)
        if not self._frozen:
            self._frozen = True
            rank_zero_warn(f"{rule} so far, and the term has no effect until one is thawed")

    def _factor(self, trainer: Trainer) -> float:
        if self.schedule is None:
            return 1.0
        return self.schedule(training_progress(trainer, with_totals=self.schedule.needs_total))

    def _add(self, pl_module: LightningModule, targets: list[Target], factor: float, scaler: Any) -> None:
        found = shared_out(
            [weight for weight, _ in targets],
            lambda index, matrix: self._term(targets[index], matrix),
            lambda index, matrix: self._empty(targets[index], matrix),
        )
        total = torch.zeros((), device=found[0][0].device)
        wanted = [(f"stable_rank/{target.weight.label}",) * 2 for target in targets]
        names = dict(zip((t.weight.label for t in targets), claim_names(pl_module, self, wanted), strict=True))
        for (weight, rank), parts in zip(targets, found, strict=True):
            value = parts[0].sum() + (rank is None) * parts[0].numel()  # of all groups; a stable rank is 1 more
            log_value(pl_module, names[weight.label], value)
            total = total + factor * self._guard.leave(value, weight.label)
            if len(parts) > 2:
                parts, self._starts[weight.label] = parts[:-1], parts[-1]
            add_gradient(weight, parts[1:], factor, scaler, wanted=value.isfinite())
        log_sum(pl_module, "stable_rank/penalty", total)

    def _term(self, target: Target, matrix: Tensor) -> tuple[Tensor, ...]:
        """Value and gradient, whole or in parts, and the vectors to go on from where they are followed."""
        rank, p = self._rank_and_power(target)
        count = self._followed(target, matrix)
        if not count:
            return exact_gradient(matrix, rank, p)
        start = self._starts.get(target.weight.label)
        if start is None or start.shape != (*matrix.shape[:-2], min(matrix.shape[-2:]), count):
            start = top_singular_subspace(matrix, count).start
        if p == 1:
            return followed_nuclear_term(matrix, rank, start.to(matrix.device))
        term = followed_term(matrix, rank, start.to(matrix.device))
        if matrix.is_cpu and bool((term.error > _ERROR).any()):  # elsewhere this look would wait for the device
            term = followed_term(matrix, rank, top_singular_subspace(matrix, count).start)
        return term[:-1]

    def _empty(self, target: Target, matrix: Tensor) -> tuple[Tensor, ...]:
        """What a rank receives `_term` into that does not compute it."""
        dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
        rank, p = self._rank_and_power(target)
        count, batch, sides = self._followed(target, matrix), matrix.shape[:-2], sorted(matrix.shape[-2:])
        in_parts = count and p == 2
        shapes = [(1, 1), (sides[0], rank), (rank, sides[1])] if in_parts else [tuple(matrix.shape[-2:])]
        if count:
            shapes.append((sides[0], count))
        return tuple(matrix.new_empty((*batch, *shape), dtype=dtype) for shape in [(), *shapes])

    def _followed(self, target: Target, matrix: Tensor) -> int:
        """How many vectors are followed; 0 where a decomposition at each step costs no more."""
        # The error of the last vector wanted shrinks the faster, the more stand behind it. After many steps a weight is
        # no longer where its vectors were left.
        rank, p = self._rank_and_power(target)
        count = rank + max(8, rank // 4)
        pays = p == 2 or _takes_products(matrix)
        return count if pays and count <= min(matrix.shape[-2:]) // 2 and self.every_n_steps <= 4 else 0

    def _rank_and_power(self, target: Target) -> tuple[int, Literal[1, 2]]:
        """A stable rank is, up to 1, what lies beyond rank 1 in squares."""
        return (1, 2) if target.rank is None else (target.rank, self.p)


def _takes_products(matrix: Tensor) -> bool:
    """Whether products are quicker than a decomposition of the Gram matrix, which leaves an accelerator idle."""
    return matrix.is_cuda and min(matrix.shape[-2:]) >= _PRODUCTS_FROM


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
