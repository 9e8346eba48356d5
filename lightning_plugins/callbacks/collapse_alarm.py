"""An alarm for representations that collapse during training."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_plugins._checks import (
    check_choice,
    check_finite_number,
    check_instance,
    check_non_negative_int,
    check_positive_int,
)
from lightning_plugins._grouping import Group, grouped
from lightning_plugins._lightning import Callback, LightningModule, Trainer, rank_zero_warn
from lightning_plugins.callbacks._monitors.collapse import METRICS, RANKS, CollapseLimits, CollapseMeasure
from lightning_plugins.callbacks._rows.pooled_capture import ObservedRows
from lightning_plugins.callbacks._rows.readout import Readout, check_readout
from lightning_plugins.callbacks._terms.logged import log_value
from lightning_plugins.callbacks._terms.training_step import WrappedStep, join_training_step
from lightning_plugins.callbacks._trainer.requirements import (
    makes_layers_late,
    require_supported,
)
from lightning_plugins.selection import check_layers


class RepresentationCollapseError(RuntimeError):
    """A layer's representation has collapsed, with ``action="raise"`` of `CollapseAlarm`."""


@dataclass(frozen=True)
class Collapse:
    """One alarm.

    Attributes:
        layer: The layer.
        step: Optimizer steps done.
        value: The metric.
        limit: What it had to be at least.
    """

    layer: str
    step: int
    value: float
    limit: float


class CollapseAlarm(Callback):
    """Watch a rank or an entropy of layers' representations on training batches, and act if it stays too low.

    The batches of every n-th optimizer step are measured, those of all processes together: only Gram matrices are
    summed, so that the value does not depend on how the rows were split, and the device is waited for at these steps
    alone. Of small batches, whose rank can't be above their number of rows, `queue_size` lets earlier ones join.

    After as many measurements of one layer in a row as `limits` say are too low, all processes act together; the layer
    can raise the alarm again after a measurement that was not too low.

    Args:
        layers: Dotted name of a layer, a glob over names, or several of them; ``"backbone.fc:input"`` selects its
            input, ``"backbone.fc"`` its output.
        metric: ``"effective_rank"``, ``"entropy"`` (nats), ``"isotropy"``, ``"rankme"`` or ``"stable_rank"``; see
            `lightning_plugins.metrics`.
        limits: `CollapseLimits`: which measurements are too low, and how many in a row must be. A number is the lowest
            acceptable value.
        action: ``"warn"``; ``"stop"`` ends the training after the step, as `EarlyStopping` does; ``"raise"`` raises
            `RepresentationCollapseError`; ``"checkpoint"`` saves ``collapse-<layer>-step=<n>.ckpt`` in `dirpath`. All
            warn.
        every_n_steps: The batches of every n-th optimizer step are measured.
        queue_size: This many rows of earlier batches are remembered, of every step; they are saved in checkpoints.
        readout: How a layer's tensor becomes rows, as ``Readout(pool="cls", mask="attention_mask")``; see
            `lightning_plugins.callbacks.Readout`.
        dirpath: Where ``"checkpoint"`` saves; the Trainer's `default_root_dir` by default.

    Raises:
        ValueError: If an argument is out of its range, or there is no limit.
        TypeError: If an argument is of the wrong type.

    Logs ``collapse/<layer>/<metric>`` at every measurement. `alarms` lists the alarms of this training.

    Example:
        >>> alarm = CollapseAlarm("projector", limits=CollapseLimits(share=0.1, patience=3), action="stop")
        >>> alarm.metric
        'effective_rank'
    """

    method = "collapse"

    @grouped(limits=Group(CollapseLimits, older={"minimum": "minimum"}, main="minimum"), readout=Readout)
    def __init__(
        self,
        layers: str | list[str],
        metric: str = "effective_rank",
        limits: float | CollapseLimits | None = None,
        *,
        action: Literal["warn", "stop", "raise", "checkpoint"] = "warn",
        every_n_steps: int = 50,
        queue_size: int = 0,
        readout: Readout = Readout(),
        dirpath: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.layers = check_layers(layers, sides=True)
        self.metric = check_choice("metric", metric, METRICS)
        if limits is None:
            raise ValueError("`limits` must say what is too low, got none; try `limits=CollapseLimits(share=0.1)`")
        if not isinstance(limits, CollapseLimits):
            limits = CollapseLimits(minimum=check_finite_number("limits", limits))
        self.limits = limits
        self.minimum, self.share, self.drop = limits.minimum, limits.share, limits.drop
        self.patience = limits.patience
        if self.share is not None and self.metric not in RANKS:
            raise ValueError(
                "`share` is of the most that a rank could be and needs a `metric` out of "
                f"{', '.join(map(repr, RANKS))}, got {self.metric!r}; use `minimum` or `drop`"
            )
        self.action = check_choice("action", action, ("warn", "stop", "raise", "checkpoint"))
        self.every_n_steps = check_positive_int("every_n_steps", every_n_steps)
        self.queue_size = check_non_negative_int("queue_size", queue_size)
        self.readout = check_readout(readout)
        self.dirpath = None if dirpath is None else str(check_instance("dirpath", dirpath, (str, Path), "a path"))
        self.alarms: list[Collapse] = []
        self._measure = CollapseMeasure(metric, self.queue_size)
        self._below: dict[str, int] = {}  # by layer, how many measurements in a row were too low
        self._best: dict[str, float] = {}
        self._pending: int | None = None  # the step whose batches are summed
        self._capture: ObservedRows | None = None
        self._step: WrappedStep | None = None

    @property
    def state_key(self) -> str:
        """Unique for every different instance, so that several keep their own entries in a checkpoint."""
        return self._generate_state_key(
            layers=self.layers,
            metric=self.metric,
            minimum=self.minimum,
            share=self.share,
            drop=self.drop,
            patience=self.patience,
            every_n_steps=self.every_n_steps,
            queue_size=self.queue_size,
            **self.readout.key(),
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module and the Trainer, and join the training step."""
        if stage != "fit":
            return
        require_supported(self, trainer, pl_module)
        if trainer.global_step == 0:  # a new training; a checkpoint's state comes after this hook
            self.load_state_dict({"below": {}, "best": {}, "queues": {}, "alarms": {}})
        self._pending = None
        self._step = join_training_step(pl_module, self)
        if not makes_layers_late(pl_module):
            self._attach(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Get ready for layers that the module's ``setup`` or ``configure_model`` has just made."""
        if self._capture is None:
            self._attach(pl_module)

    @contextmanager
    def recording(self, pl_module: LightningModule) -> Iterator[None]:
        """Take the rows of this training step if it is its turn (for the wrapper of the training step)."""
        measured = pl_module.global_step % self.every_n_steps == 0
        if self._capture is None or not (measured or self.queue_size):
            yield
            return
        with self._capture.recording(self._step.batch if self._step is not None else None):
            yield
        with torch.no_grad():
            taken = self._capture.take()
            for label in self._capture.labels:
                self._measure.add(label, taken.get(label, []), pl_module.device)
        if measured:
            self._pending = pl_module.global_step

    def penalty(self, pl_module: LightningModule) -> None:
        """Nothing is added to the loss (for the wrapper of the training step)."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if the optimizer step whose batches were taken is done."""
        if self._pending is None or self._capture is None or trainer.global_step == self._pending:
            return
        self._pending = None
        with torch.no_grad():
            values, most = self._measure.values(self._capture.labels, pl_module.device)
        for label, value in values.items():
            log_value(pl_module, f"collapse/{label}/{self.metric}", value)
        for alarm in self._judge(values, most, trainer.global_step):
            self._act(alarm, trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        if self._capture is not None:
            self._capture.detach()
        if self._step is not None:
            self._step.leave(self)
        self._capture = self._step = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was: ``teardown`` does not run after an exception."""
        self.teardown(trainer, pl_module, stage="fit")

    def state_dict(self) -> dict[str, Any]:
        """Return counts, best values, remembered rows and alarms."""
        return {
            "below": dict(self._below),
            "best": dict(self._best),
            "queues": self._measure.state(),
            "alarms": {
                f"{index}/{alarm.layer}": [alarm.step, alarm.value, alarm.limit]
                for index, alarm in enumerate(self.alarms)
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's counts."""
        self._below, self._best = dict(state_dict["below"]), dict(state_dict["best"])
        self._measure.load_state(state_dict["queues"])
        alarms = state_dict["alarms"].items()
        self.alarms = [Collapse(key.partition("/")[2], *numbers) for key, numbers in alarms]

    def _attach(self, pl_module: LightningModule) -> None:
        self._capture = ObservedRows(pl_module, self.layers, self.readout)
        self._capture.attach()

    def _judge(self, values: dict[str, float], most: dict[str, int], step: int) -> list[Collapse]:
        """Count measurements that are too low; the alarms that are due now."""
        due = []
        for label, value in values.items():
            limits = [] if self.minimum is None else [self.minimum]
            if self.share is not None:
                limits.append(self.share * most[label])
            if self.drop is not None and label in self._best:
                limits.append((1 - self.drop) * self._best[label])
            limit = max(limits, default=-math.inf)
            if value >= limit:  # written so that NaN is too low
                self._below[label] = 0
            else:
                self._below[label] = self._below.get(label, 0) + 1
                if self._below[label] == self.patience:
                    due.append(Collapse(label, step, value, limit))
            if value > self._best.get(label, -math.inf):
                self._best[label] = value
        return due

    def _act(self, alarm: Collapse, trainer: Trainer) -> None:
        self.alarms.append(alarm)
        message = (
            f"the representation of {alarm.layer!r} may have collapsed: its {self.metric} is {alarm.value:.4g} at step "
            f"{alarm.step}, below {alarm.limit:.4g}, in {self.patience} measurement(s) in a row"
        )
        if self.action == "raise":
            raise RepresentationCollapseError(message)
        if self.action == "stop":
            trainer.should_stop = True
            message += "; training stops"
        elif self.action == "checkpoint":
            path = Path(self.dirpath or trainer.default_root_dir, f"collapse-{alarm.layer}-step={alarm.step}.ckpt")
            trainer.save_checkpoint(path)  # on all processes together
            message += f"; saved {path}"
        rank_zero_warn(message)
