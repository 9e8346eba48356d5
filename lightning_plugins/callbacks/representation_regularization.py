"""A term of layers' representations as a callback for training loops that already exist."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_plugins import regularizers
from lightning_plugins._checks import check_choice, check_finite_number, check_non_negative_int, check_positive_int
from lightning_plugins._grouping import grouped
from lightning_plugins._lightning import Callback, LightningModule, MisconfigurationException, Trainer, rank_zero_warn
from lightning_plugins.callbacks._rows.capture import LayerRows
from lightning_plugins.callbacks._rows.readout import Readout, check_readout
from lightning_plugins.callbacks._terms.given_term import OverProcesses, check_name, check_term, term_key
from lightning_plugins.callbacks._terms.logged import claim_names, log_value, release_names
from lightning_plugins.callbacks._terms.nonfinite import NonfiniteGuard
from lightning_plugins.callbacks._terms.training_step import WrappedStep, join_training_step
from lightning_plugins.callbacks._trainer.progress import check_schedule, steps_done, training_progress
from lightning_plugins.callbacks._trainer.requirements import (
    makes_layers_late,
    require_automatic_optimization,
    require_known_total,
    require_lightning_module,
    require_same_on_ranks,
    require_supported_strategy,
)
from lightning_plugins.distributed import RankError, is_distributed
from lightning_plugins.regularizers.agreement import withdraw
from lightning_plugins.schedules import Schedule
from lightning_plugins.selection import check_layers

_KNOWN = tuple(name for name in regularizers.__all__ if hasattr(getattr(regularizers, name), "with_rows"))


class RepresentationRegularization(Callback):
    """Add a term of layers' representations to the loss of a training, with no change to the model.

    Adds ``weight * term(embeddings)`` to the loss of every training step. The term is part of what ``training_step``
    returns: logged losses, gradient accumulation, loss scaling, clipping and DDP all see it. Several layers give one
    term each, and they are summed. A layer that a step calls several times (two views of a batch) gives the mean of its
    terms.

    Args:
        layers: Dotted name of a layer, a glob over names, or several of them; ``"backbone.fc:input"`` selects its
            input, ``"backbone.fc"`` its output.
        term: A term of `lightning_plugins.regularizers` (`VonNeumannEntropy`, `RenyiEntropy`, `CodingRate`,
            `VICRegVariance`, `VICRegCovariance`, `SIGReg`, `SpreadOut`, `Decorrelation`) or your own module that maps
            embeddings ``(N, d)`` to a scalar, to be minimised; over several processes it gets the rows of all of them.
            In YAML its ``class_path`` and ``init_args``. A term with an attribute ``step`` is told the optimizer step.
            Parameters of a term are not trained.
        weight: Factor on the term, in addition to its own weight, if any.
        name: What to log the term under; the name of its class by default, as in ``coding_rate``.
        readout: How a layer's tensor becomes rows, as ``Readout(pool="cls", mask="attention_mask")``; see
            `lightning_plugins.callbacks.Readout`.
        queue_size: This many rows of earlier batches are remembered and join the batch, for batches too small to show
            a spectrum. No gradient flows through them, so that N rows with a queue of Q want about (N + Q) / N times
            the ``weight``; they are saved in checkpoints.
        schedule: Factor on ``weight`` as a function of training progress (`lightning_plugins.schedules`).
        every_n_steps: Only every n-th optimizer step carries the term, then n times as strong.
        on_nonfinite: ``"skip"`` leaves out a term that is NaN or infinite, with one warning and a count in the log:
            nothing is added to the loss, and zeros flow back into the layer; ``"raise"`` raises `FloatingPointError`,
            which costs a synchronisation with the device at every step.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of the wrong type.

    Logs ``<name>/<layer>`` (the term) and ``<name>/penalty`` (``weight`` times the sum of the terms, of all such
    callbacks of one name) at every step that carries the term, and ``<name>/skipped`` once one had to be left out.

    Example:
        >>> from lightning_plugins.regularizers import CodingRate
        >>> callback = RepresentationRegularization("head:input", CodingRate(distortion=0.1), weight=0.01)
        >>> callback.method
        'coding_rate'
    """

    @grouped(readout=Readout)
    def __init__(
        self,
        layers: str | list[str],
        term: nn.Module,
        weight: float = 1.0,
        *,
        name: str | None = None,
        readout: Readout = Readout(),
        queue_size: int = 0,
        schedule: Schedule | None = None,
        every_n_steps: int = 1,
        on_nonfinite: Literal["skip", "raise"] = "skip",
    ) -> None:
        super().__init__()
        self.layers = check_layers(layers)
        self.term = check_term(term, example="CodingRate()", known=_KNOWN)
        self.weight = check_finite_number("weight", weight)
        self.method = check_name(name, term)
        self.readout = check_readout(readout)
        self.pool = readout.pool
        self.queue_size = check_non_negative_int("queue_size", queue_size)
        self.schedule = check_schedule(schedule)
        self.every_n_steps = check_positive_int("every_n_steps", every_n_steps)
        self._over_processes: Any = term if hasattr(term, "with_rows") else OverProcesses(term)
        if queue_size and self._over_processes.scope == "local":
            raise ValueError(
                "`queue_size` remembers the rows of all ranks and needs `scope='global'`, got `scope='local'`; "
                "on a single device the two scopes are the same"
            )
        self._guard = NonfiniteGuard(self.method, check_choice("on_nonfinite", on_nonfinite, ("skip", "raise")))
        self._queues: dict[str, Tensor] = {}  # per layer, rows, the newest last
        self._constant: set[str] = set()  # layers that a warning was given for
        self._single: set[str] = set()  # layers that a warning of single rows was given for
        self._capture: LayerRows | None = None
        self._names: dict[str, str] = {}  # by layer, what its term is logged under
        self._step: WrappedStep | None = None

    @property
    def state_key(self) -> str:
        """Unique for every different instance, so that several keep their own entries in a checkpoint."""
        return self._generate_state_key(
            layers=self.layers,
            term=term_key(self.term),
            weight=self.weight,
            name=self.method,
            **self.readout.key(),
            queue_size=self.queue_size,
            schedule=repr(self.schedule),
            every_n_steps=self.every_n_steps,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module and the Trainer, register the hooks and join the training step."""
        if stage != "fit":
            return
        name = type(self).__name__
        require_lightning_module(name, pl_module)
        require_automatic_optimization(name, pl_module, mixin=self._mixin)
        require_supported_strategy(name, trainer)
        require_known_total(name, self.schedule, trainer)
        if trainer.global_step == 0:  # a new training; a checkpoint's state comes after this hook
            self._queues.clear()
            self._guard.restore(0)
        self._step = join_training_step(pl_module, self)
        if not makes_layers_late(pl_module):
            self._attach(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register the hooks of layers that the module's ``setup`` or ``configure_model`` has just made."""
        if isinstance(self.term, nn.Module):
            self.term.to(pl_module.device)  # the user's own buffers
        if self._capture is None:
            self._attach(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        if self._capture is not None:
            self._capture.detach()
        if self._step is not None:
            self._step.leave(self)
        self._capture = self._step = None
        release_names(pl_module, self)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was: ``teardown`` does not run after an exception."""
        self.teardown(trainer, pl_module, stage="fit")

    def recording(self, pl_module: LightningModule) -> AbstractContextManager[None]:
        """Record the layers' tensors if this step carries the term (for the wrapper of the training step)."""
        if self._capture is None or steps_done(pl_module.trainer) % self.every_n_steps:
            return nullcontext()
        return self._capture.recording(self._step.batch if self._step is not None else None)

    def penalty(self, pl_module: LightningModule) -> Tensor | None:
        """The sum of the layers' terms at this step (for the wrapper of the training step)."""
        if self._capture is None or steps_done(pl_module.trainer) % self.every_n_steps:
            return None
        if hasattr(self.term, "step"):
            self.term.step = pl_module.global_step
        weight = self.weight * self.every_n_steps * self._factor(pl_module.trainer)
        penalties = []
        for label, tensors in self._taken(self._capture).items():
            self._over_processes.calls = len(tensors)
            values = [self._value(tensor, label) for tensor in tensors]
            self._warn_if_constant(label, tensors)
            log_value(pl_module, self._names[label], self._shown(torch.stack(values).detach().mean()))
            kept = [self._guard.leave(value, label) for value in values]
            penalties.append(weight * torch.stack(kept).mean())
        return torch.stack(penalties).sum()

    def abandon(self, pl_module: LightningModule) -> bool:
        """Tell the other ranks that this one's step has failed (for the wrapper of the training step)."""
        due = self._capture is not None and steps_done(pl_module.trainer) % self.every_n_steps == 0
        if waited_for := due and self._over_processes.scope == "global":
            withdraw()
        return waited_for

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say once if terms were left out, when the loggers look at the device anyway."""
        self._guard.report(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say once if terms were left out."""
        self._guard.warn_once()

    def state_dict(self) -> dict[str, Any]:
        """The remembered rows and the count of terms left out."""
        return {
            "queues": {label: rows.clone() for label, rows in self._queues.items()},
            "skipped": self._guard.skipped(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's rows and count."""
        self._queues = dict(state_dict["queues"])
        self._guard.restore(state_dict["skipped"])

    # What a named front of one term may do in another way

    _mixin = "VNEMixin"
    _of_single = (
        "`layers`: {label!r} gave one row, too few for a term over a batch; make batches of about 32 "
        "rows or more, or remember earlier ones with `queue_size`"
    )

    def _name_of(self, label: str) -> str:
        """The name that a layer's term is logged under."""
        return f"{self.method}/{label}"

    def _shown(self, value: Tensor) -> Tensor:
        """The number that is logged of a term."""
        return value

    def _attach(self, pl_module: LightningModule) -> None:
        self._capture = LayerRows(pl_module, self.layers, self.readout)
        require_same_on_ranks(type(self).__name__, self._capture.labels, self.state_key)
        self._capture.attach()
        wanted = [(self._name_of(label), self._name_of(other)) for label, other in self._capture.log_names]
        self._names = dict(zip(self._capture.labels, claim_names(pl_module, self, wanted), strict=True))

    def _taken(self, capture: LayerRows) -> dict[str, list[Tensor]]:
        try:
            return capture.take()
        except (MisconfigurationException, TypeError, ValueError) as error:
            if self._over_processes.scope == "global":  # the other ranks wait for this one's rows
                withdraw(getattr(error, "place", None))
            raise

    def _factor(self, trainer: Trainer) -> float:
        if self.schedule is None:
            return 1.0
        return self.schedule(training_progress(trainer, with_totals=self.schedule.needs_total))

    def _warn_if_constant(self, label: str, tensors: list[Tensor]) -> None:
        # No error: a callback that thaws layers may be at work.
        if label not in self._constant and not any(tensor.requires_grad for tensor in tensors):
            self._constant.add(label)
            rank_zero_warn(
                f"`layers`: nothing before {label!r} is trained at this step, so its term has no effect on any weight; "
                "name a layer behind one that is trained, if nothing will be thawed"
            )

    def _warn_if_single(self, label: str, embeddings: Tensor) -> None:
        alone = len(embeddings) == 1 and (self._over_processes.scope == "local" or not is_distributed())
        if alone and not self.queue_size and label not in self._single:
            self._single.add(label)
            rank_zero_warn(self._of_single.format(label=label))

    def _value(self, embeddings: Tensor, label: str) -> Tensor:
        try:
            self._warn_if_single(label, embeddings)
            embeddings = self._guard.enter(embeddings)
            if not self.queue_size:
                return cast(Tensor, self._over_processes(embeddings))
            value, rows = self._over_processes.with_rows(embeddings, self._queues.get(label))
        except RankError as error:
            at = label if error.place is None else list(self._names)[error.place]
            raise RankError(f"`layers`: {at!r}: {error}") from error
        except (TypeError, ValueError) as error:
            raise type(error)(f"`layers`: {label!r}: {error}") from error
        # a NaN row would spoil every value until it leaves the queue
        self._queues[label] = rows[-self.queue_size :].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return cast(Tensor, value)
