"""Early termination of hopeless trainings, the same on all processes."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_plugins._checks import check_positive_int
from lightning_plugins._lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    is_overridden,
    rank_zero_warn,
)
from lightning_plugins.callbacks._trainer.requirements import require_lightning_module
from lightning_plugins.search.tercet import TercetRule

if TYPE_CHECKING:
    import optuna


class EarlyTermination(Callback):
    """End a training that looks hopeless compared with others, at the same epoch on all processes.

    Behind every epoch with a validation the first process reports the monitored metric and decides; its decision is
    broadcast, and every process leaves ``fit`` by Lightning's own stop, with checkpoints and ``teardown`` as ever. With
    Optuna, `raise_if_ended` is then called behind ``fit`` and raises `optuna.TrialPruned` on every process, once no
    process waits for another. Any storage will do, since only the first process talks to it.

    Args:
        monitor: Name of the metric, as logged in validation; the same value on all processes, or that of the first
            counts.
        trial: With Optuna: the trial, whose study's pruner decides (`lightning_plugins.search.TercetPruner`, or any).
            Needed by the first process only.
        history: Without Optuna: path of a JSON Lines file of former learning curves, one array a line. The rule decides
            against them, and a training that comes to its end, or is ended, adds its own.
        rule: The rule for ``history``; `lightning_plugins.search.TercetRule` by default.
        total: The number of values of a whole training, for ``history``; by default that of the Trainer's
            ``max_epochs``.

    Raises:
        ValueError: If there are a trial and a history, or a number is out of range.
        TypeError: If an argument is of the wrong type.

    Logs nothing. `ended` tells whether the training was ended, `curve` holds the values.

    Example:
        >>> from lightning_plugins.search import TercetRule
        >>> callback = EarlyTermination("val_acc", history="curves.jsonl", rule=TercetRule(mode="max"))
        >>> callback.ended
        False

    Source:
        Cho et al., https://arxiv.org/abs/2202.03005, for the rule.
    """

    def __init__(
        self,
        monitor: str,
        *,
        trial: "optuna.trial.BaseTrial | None" = None,
        history: str | os.PathLike[str] | None = None,
        rule: TercetRule | None = None,
        total: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(monitor, str) or not monitor:
            raise TypeError(f"`monitor` must be the name of a logged metric, got {monitor!r}")
        if trial is not None and history is not None:
            raise ValueError("`trial` and `history` are two ways to decide; pass one of them")
        if trial is not None and not callable(getattr(trial, "should_prune", None)):
            raise TypeError(f"`trial` must be an Optuna trial, got {trial!r} ({type(trial).__name__})")
        if history is not None and not isinstance(history, str | os.PathLike):
            raise TypeError(f"`history` must be a path, got {history!r} ({type(history).__name__})")
        if rule is not None and history is None:
            raise ValueError("`rule` decides against a `history`; a trial is ended by the pruner of its study")
        if rule is not None and not isinstance(rule, TercetRule):
            raise TypeError(f"`rule` must be a TercetRule, got {rule!r} ({type(rule).__name__})")
        self.monitor = monitor
        self.trial = trial
        self.history = None if history is None else Path(history)
        self.rule = rule or TercetRule()
        self.total = None if total is None else check_positive_int("total", total)
        self.curve: list[float] = []
        self.ended = False
        self._validated = False

    @property
    def state_key(self) -> str:
        """Unique for every monitored metric."""
        return self._generate_state_key(monitor=self.monitor)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is something to decide with, and a validation to look at."""
        if stage != "fit":
            return
        name = type(self).__name__
        require_lightning_module(name, pl_module)
        if trainer.is_global_zero and self.trial is None and self.history is None:
            raise MisconfigurationException(f"{name} needs a `trial` or a `history` on the first process, got neither")
        if not is_overridden("validation_step", pl_module):
            raise MisconfigurationException(
                f"{name} monitors validation, and {type(pl_module).__name__} has no `validation_step`"
            )
        if self.history is not None and self.total is None and trainer.max_epochs in {None, -1}:
            raise MisconfigurationException(
                f"{name}: the length of training is unknown with `max_epochs=-1`; pass `total`"
            )
        if trainer.global_step == 0:  # a new training; a checkpoint's state comes after this hook
            self.curve, self.ended = [], False
        self._validated = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember that this epoch has a value."""
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the value, decide on the first process, and stop all of them together."""
        if not self._validated:
            return
        self._validated = False
        if self.monitor not in trainer.callback_metrics:  # the same on all processes, so none waits for another one
            known = sorted(trainer.callback_metrics)
            raise MisconfigurationException(f"`monitor` must be a logged metric, one of {known}, got {self.monitor!r}")
        self.curve.append(float(trainer.callback_metrics[self.monitor]))
        decision, error = self._decide(trainer) if trainer.is_global_zero else (False, None)
        decision, error = trainer.strategy.broadcast((decision, error))
        if error is not None:  # on all processes, so that none is left waiting for the first
            raise RuntimeError(f"`{type(self).__name__}` could not decide on the first process: {error}")
        self.ended = decision
        if self.ended:
            trainer.should_stop = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the curve to the file of curves."""
        if self.history is not None and trainer.is_global_zero and self.curve and not trainer.interrupted:
            self._append()

    def raise_if_ended(self) -> None:
        """Raise Optuna's exception for a pruned trial if the training was ended; call it behind ``fit``.

        Raises:
            optuna.TrialPruned: On every process.
        """
        if self.ended and self.history is None:
            from optuna import TrialPruned

            raise TrialPruned(f"stopped after validation {len(self.curve)} with {self.monitor} = {self.curve[-1]}")

    def state_dict(self) -> dict[str, Any]:
        """The curve so far, and whether the training was ended."""
        return {"curve": list(self.curve), "ended": self.ended}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's curve."""
        self.curve, self.ended = list(state_dict["curve"]), bool(state_dict["ended"])

    def _decide(self, trainer: Trainer) -> tuple[bool, str | None]:
        """The decision, or the error that was met on the way to it."""
        try:
            if self.trial is not None:
                self.trial.report(self.curve[-1], step=len(self.curve) - 1)
                return bool(self.trial.should_prune()), None
            return self.rule.ends(self.curve, self._former(), self.total or self._epochs(trainer)), None
        except Exception as error:  # noqa: BLE001  # of any storage; raised again behind the broadcast
            return False, f"{type(error).__name__}: {error}"

    def _epochs(self, trainer: Trainer) -> int:
        return max(1, (trainer.max_epochs or 1) // (trainer.check_val_every_n_epoch or 1))

    def _former(self) -> list[list[float]]:
        """The curves of the file; a line that is no curve, such as a truncated one, is passed over with a warning."""
        if self.history is None or not self.history.exists():
            return []
        curves = []
        for number, line in enumerate(self.history.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                curves.append([float(value) for value in json.loads(line)])
            except (ValueError, TypeError):
                rank_zero_warn(f"`history`: line {number} of {self.history} is not an array of numbers and is skipped")
        return curves

    def _append(self) -> None:
        if self.history is None:
            return
        self.history.parent.mkdir(parents=True, exist_ok=True)
        line = (json.dumps(self.curve) + "\n").encode()
        # One write to a file opened for appending: trainings that end at the same time do not mix their lines.
        descriptor = os.open(self.history, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
