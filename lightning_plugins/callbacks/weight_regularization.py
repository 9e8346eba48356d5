"""A term of weights as a callback for training loops that already exist."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_plugins import regularizers
from lightning_plugins._checks import check_choice, check_finite_number, check_positive_int
from lightning_plugins._lightning import Callback, LightningModule, MisconfigurationException, Trainer, rank_zero_warn
from lightning_plugins.callbacks._terms.given_term import (
    GradientTerm,
    check_name,
    check_term,
    term_key,
    value_and_gradient,
)
from lightning_plugins.callbacks._terms.logged import claim_names, log_sum, log_value, release_names
from lightning_plugins.callbacks._terms.nonfinite import NonfiniteGuard
from lightning_plugins.callbacks._terms.weight_gradients import add_gradient, scaler_of_fused, shared_out
from lightning_plugins.callbacks._terms.weights_in_use import WeightsInUse
from lightning_plugins.callbacks._trainer.progress import check_schedule, training_progress
from lightning_plugins.callbacks._trainer.requirements import (
    makes_layers_late,
    require_known_total,
    require_lightning_module,
    require_same_on_ranks,
    require_supported_strategy,
)
from lightning_plugins.computed_weights import parametrizations_at_rest
from lightning_plugins.schedules import Schedule
from lightning_plugins.selection import check_layers
from lightning_plugins.weights import WeightMatrix, check_scheme, select_weight_matrices

_KNOWN = tuple(name for name in regularizers.__all__ if hasattr(getattr(regularizers, name), "value_and_gradient"))


class WeightRegularization(Callback):
    """Add a term of the weights of selected layers to training, without changing the model.

    The sum over the layers of ``weight * term(W)`` is lowered: its gradient is added once an optimizer step, however
    many batches are accumulated, after the processes' gradients were averaged and an fp16 scaler undone, before
    clipping. The layers are divided among the processes and the gradients exchanged. It works for manual optimization
    too. The loss that is logged is without the term. A weight that has no gradient at a step (frozen, or not used) gets
    none from the term either. One that is computed by a parametrization, a norm or pruning passes the gradient on to
    the parameters it is computed from.

    Args:
        layers: Dotted name of a layer, a glob over names, or several of them. Among the matches of a glob the linear
            layers, the convolutions and the projections of ``nn.MultiheadAttention`` are taken; each group of a grouped
            convolution is a matrix of its own, whose terms are summed.
        term: A term of `lightning_plugins.regularizers` (`StableRank`, `ModifiedStableRank`, `NuclearNorm`,
            `SoftOrthogonality`, `SpectralNorm`) or one of your own: an object with ``value_and_gradient(matrix)``, or a
            module that maps matrices ``(..., m, n)`` to values and is differentiated by autograd. In YAML its
            ``class_path`` and ``init_args``.
        weight: Factor on the term, in addition to its own weight, if any.
        name: What to log the term under; the name of its class by default, as in ``soft_orthogonality``.
        scheme: How a convolution's kernel becomes a matrix: 1 for ``O x (I * k * k)``, 2 for ``(O * k) x (I * k)``.
        schedule: Factor on ``weight`` as a function of training progress (`lightning_plugins.schedules`).
        every_n_steps: Only every n-th step of an optimizer carries the term, then n times as strong.
        on_nonfinite: ``"skip"`` leaves out a term that is NaN or infinite, with one warning and a count in the log;
            ``"raise"`` raises `FloatingPointError`, which costs a synchronisation with the device at every step.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of the wrong type.

    Logs ``<name>/<layer>``, the term of each layer, and ``<name>/penalty``, ``weight`` times the sum of the terms, of
    all callbacks of that name, at every step that carries them, and ``<name>/skipped`` once a term had to be left out.
    The weights that are taken, and those that are passed over, are named at the start.

    Example:
        >>> from lightning_plugins.regularizers import SoftOrthogonality
        >>> callback = WeightRegularization("backbone.*", SoftOrthogonality(), weight=1e-4)
        >>> callback.name
        'soft_orthogonality'
    """

    def __init__(
        self,
        layers: str | list[str],
        term: nn.Module | GradientTerm,
        weight: float = 1.0,
        *,
        name: str | None = None,
        scheme: Literal[1, 2] = 1,
        schedule: Schedule | None = None,
        every_n_steps: int = 1,
        on_nonfinite: Literal["skip", "raise"] = "skip",
    ) -> None:
        super().__init__()
        self.layers = check_layers(layers, sides=False)
        self.term = check_term(term, example="SoftOrthogonality()", known=_KNOWN)
        self.weight = check_finite_number("weight", weight)
        self.name = check_name(name, term)
        self.scheme: Literal[1, 2] = check_scheme(scheme)
        self.schedule = check_schedule(schedule)
        self.every_n_steps = check_positive_int("every_n_steps", every_n_steps)
        self._guard = NonfiniteGuard(self.name, check_choice("on_nonfinite", on_nonfinite, ("skip", "raise")))
        self._steps: dict[int, int] = {}  # per optimizer, the steps seen
        self._in_use = WeightsInUse(type(self).__name__, self.layers, self._find, lambda weight: weight)
        self._frozen = False  # whether it has warned that nothing is trained

    @property
    def state_key(self) -> str:
        """Unique for every different instance, so that several keep their own entries in a checkpoint."""
        return self._generate_state_key(
            layers=self.layers,
            term=term_key(self.term),
            weight=self.weight,
            name=self.name,
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
            self._forget()
            self._steps.clear()
        self._frozen = False
        if not makes_layers_late(pl_module):
            self._in_use.find(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find weights that were made only now, and check that an optimizer trains some."""
        weights = self._in_use.find(pl_module)
        self._in_use.tell(pl_module)
        with parametrizations_at_rest(pl_module):  # a shape may have to be computed
            names = [f"{weight.label} {tuple(weight.shape)}" for weight in weights]
        require_same_on_ranks(type(self).__name__, names, self.state_key)
        self._check_trained(trainer, weights)
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
            raise MisconfigurationException(
                f"{type(self).__name__} adds a gradient without a loss, and LBFGS compares losses; use another "
                f"optimizer, or {self._instead_of_lbfgs}, whose term is part of the loss"
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
        weights = [weight for weight in present if any(id(source) in trained for source in weight.sources)]
        if not weights or step % self.every_n_steps:
            return
        factor = self.weight * self.every_n_steps * self._factor(trainer)
        if factor == 0:
            self._forget(weights)
            return
        with torch.no_grad(), parametrizations_at_rest(pl_module):
            self._add(pl_module, weights, factor, scaler_of_fused(trainer, optimizer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say once if terms were left out, when the loggers look at the device anyway."""
        self._guard.report(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say once if terms were left out."""
        self._guard.warn_once()

    def state_dict(self) -> dict[str, Any]:
        """The steps of each optimizer, and the count of terms left out."""
        return {"steps": dict(self._steps), "skipped": self._guard.skipped()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's counts."""
        self._steps = dict(state_dict["steps"])
        self._guard.restore(state_dict["skipped"])

    # What a named front of one term may do in another way

    _instead_of_lbfgs = "add the term to the loss in `training_step`"

    def _find(self, model: nn.Module, layers: Sequence[str]) -> list[WeightMatrix]:
        with parametrizations_at_rest(model):
            return select_weight_matrices(model, layers, scheme=self.scheme, computed=True)

    def _term(self, weight: WeightMatrix, matrix: Tensor) -> tuple[Tensor, ...]:
        """Value and gradient, whole or in parts, on the one process that computes them."""
        return value_and_gradient(self.term, matrix)

    def _empty(self, weight: WeightMatrix, matrix: Tensor) -> tuple[Tensor, ...]:
        """Buffers to receive `_term` into, on processes that do not compute it."""
        dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
        return matrix.new_empty((), dtype=dtype), matrix.new_empty(matrix.shape, dtype=dtype)

    def _received(self, weight: WeightMatrix, parts: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The value of a term and its gradient's parts, on all processes."""
        return parts[0], parts[1:]

    def _forget(self, weights: list[WeightMatrix] | None = None) -> None:
        """Drop the state of weights whose term was skipped, or of all."""

    def _check_trained(self, trainer: Trainer, weights: Sequence[WeightMatrix]) -> None:
        """Raise an error for weights that no optimizer trains; frozen ones may be unfrozen by another callback."""
        sources = [source for weight in weights for source in weight.sources]
        optimized = {id(parameter) for optimizer in trainer.optimizers for parameter in _parameters(optimizer)}
        if any(id(source) in optimized and source.requires_grad for source in sources):
            return
        labels = ", ".join(weight.label for weight in weights[:5])
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

    def _add(self, pl_module: LightningModule, weights: list[WeightMatrix], factor: float, scaler: Any) -> None:
        found = shared_out(
            weights,
            lambda index, matrix: self._term(weights[index], matrix),
            lambda index, matrix: self._empty(weights[index], matrix),
        )
        received = [self._received(weight, parts) for weight, parts in zip(weights, found, strict=True)]
        labels = [weight.label for weight in weights]
        self._log(pl_module, dict(zip(labels, (value for value, _ in received), strict=True)), factor)
        for weight, (value, gradient) in zip(weights, received, strict=True):
            add_gradient(weight, gradient, factor, scaler, wanted=value.isfinite())

    def _log(self, pl_module: LightningModule, values: dict[str, Tensor], factor: float) -> None:
        """Log the terms, and their sum without those that are not finite; or raise an error if there are such."""
        wanted = [(f"{self.name}/{label}",) * 2 for label in values]
        for name, value in zip(claim_names(pl_module, self, wanted), values.values(), strict=True):
            log_value(pl_module, name, value)
        finite = self._guard.leave_all(torch.stack(list(values.values())), list(values))
        log_sum(pl_module, f"{self.name}/penalty", factor * finite.sum())


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
