"""One trial for all processes of a distributed training: the first one asks the study and broadcasts."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from lightning_plugins._arguments import check_arguments
from lightning_plugins._checks import check_finite_number, check_int, check_positive_int, shown
from lightning_plugins.distributed import is_distributed

try:
    import optuna
    from optuna.trial import TrialState
except ImportError as error:
    raise ImportError("searches need Optuna; run `pip install 'lightning-plugins[search]'`") from error

if TYPE_CHECKING:
    from optuna.study import Study


class SharedTrial:
    """A trial shared by all processes of a group; all must make the same calls in the same order.

    Args:
        trial: The trial on the first process, None on the others.

    Example:
        >>> study = optuna.create_study()
        >>> shared = SharedTrial(study.ask())  # one process: the trial itself
        >>> 0 <= shared.suggest_float("x", 0, 1) <= 1, shared.number
        (True, 0)
    """

    def __init__(self, trial: "optuna.trial.Trial | None") -> None:
        if trial is not None and not hasattr(trial, "suggest_float"):
            raise TypeError(f"`trial` must be a trial of Optuna's, got {shown(trial)}")
        if trial is None and _first():
            raise ValueError("`trial` must be a trial on the first process, got None")
        self.trial = trial
        self.number: int = _shared(lambda: self._own.number)
        self.params: dict[str, Any] = {}

    @property
    def _own(self) -> "optuna.trial.Trial":
        if self.trial is None:
            raise RuntimeError("only the first process has the trial")
        return self.trial

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Return the same number on every process; like Optuna's method of this name."""
        for argument, number in (("low", low), ("high", high), ("step", 1.0 if step is None else step)):
            check_finite_number(argument, number)
        return float(self._suggest(name, lambda: self._own.suggest_float(name, low, high, step=step, log=log)))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """Return the same int on every process; like Optuna's method of this name."""
        for argument, number in (("low", low), ("high", high), ("step", step)):
            check_int(argument, number)
        return int(self._suggest(name, lambda: self._own.suggest_int(name, low, high, step=step, log=log)))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return the same choice on every process; like Optuna's method of this name."""
        return self._suggest(name, lambda: self._own.suggest_categorical(name, choices))

    def set_user_attr(self, key: str, value: Any) -> None:
        """Store a user attribute of the trial, on the first process."""
        if self.trial is not None:
            self.trial.set_user_attr(key, value)

    def _suggest(self, name: str, ask: Any) -> Any:
        self.params[name] = _shared(ask)
        return self.params[name]


def shared_trials(study: "Study | None", n_trials: int) -> Iterator[SharedTrial]:
    """Ask for trials shared by all processes of the current group.

    The caller must finish each of them with `finish_trial`. Without a group the single process is the first.

    Args:
        study: The study on the first process, None on the others.
        n_trials: The number of trials.

    Yields:
        The trials, one at a time.

    Raises:
        TypeError: If ``study`` is not an Optuna study.
        ValueError: If the first process has no study, or ``n_trials`` is less than 1.
    """
    if study is not None and not hasattr(study, "ask"):
        raise TypeError(f"`study` must be a study of Optuna's, got {shown(study)}")
    check_arguments(shared_trials, locals())
    check_positive_int("n_trials", n_trials)
    if study is None and _first():
        raise ValueError("`study` must be a study on the first process, got None")
    for _ in range(n_trials):
        yield SharedTrial(_ask(study))


def finish_trial(study: "Study | None", trial: SharedTrial, value: float | None, *, pruned: bool = False) -> None:
    """Report the result of a trial to the study, on the first process.

    Args:
        study: The study on the first process.
        trial: The trial.
        value: The objective; None for a trial that failed, or for a pruned one.
        pruned: Whether the training was stopped early.
    """
    if study is None or trial.trial is None:
        return
    if pruned:
        study.tell(trial.trial, state=TrialState.PRUNED)
    elif value is None:
        study.tell(trial.trial, state=TrialState.FAIL)
    else:
        study.tell(trial.trial, value)


def _ask(study: "Study | None") -> "optuna.trial.Trial | None":
    asked: list[optuna.trial.Trial] = []
    _shared(lambda: asked.append(study.ask()) if study is not None else None)  # errors are raised on all processes
    return asked[0] if asked else None


def _first() -> bool:
    return not is_distributed() or dist.get_rank() == 0


def _shared(ask: Any) -> Any:
    """Return or raise on every process what the first process's call returns or raises."""
    if not is_distributed():
        return ask()
    outcome: list[Any] = [None, None]
    if _first():
        try:
            outcome[0] = ask()
        except Exception as error:  # noqa: BLE001  # raised below, on all processes alike: none is left waiting
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
