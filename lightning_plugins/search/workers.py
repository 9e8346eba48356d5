"""Worker processes of a search: each runs trials until none is left, and killed workers are replaced."""

import multiprocessing
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

from lightning_plugins._checks import check_non_negative_int, check_positive_int

if TYPE_CHECKING:
    import optuna

    from lightning_plugins.search.trainings import Search

_RETRIED = "retried"


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Processes of a search by `tune`, and the retries of trials whose process was killed.

    Attributes:
        count: The number of processes, at least 1; 1 runs in this one.
        retries: Number of retries of a killed trial.

    Raises:
        TypeError: If a field is not an int.
        ValueError: If a field is out of its range.

    Example:
        >>> Workers(count=4).retries
        1
    """

    count: int = 1
    retries: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", check_positive_int("count", self.count))
        object.__setattr__(self, "retries", check_non_negative_int("retries", self.retries))


def run_workers(search: "Search", study: "optuna.Study", n_trials: int, *, workers: int, retries: int) -> None:
    """Run trials in several processes until a given number has finished.

    Args:
        search: Settings for the workers.
        study: The study.
        n_trials: The number of trials.
        workers: The number of processes.
        retries: Number of retries of the trial of a killed worker.

    Raises:
        RuntimeError: If a worker ended with an exception.
    """
    context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
    left = context.Value("i", max(n_trials, 0))
    started = 0

    def start() -> Any:
        nonlocal started
        process = context.Process(target=_work, args=(search, left), name=f"worker-{started}")
        started += 1
        process.start()
        return process

    running = [start() for _ in range(min(workers, n_trials))]
    try:
        while running:
            ended = wait([process.sentinel for process in running])
            for process in [process for process in running if process.sentinel in ended]:
                running.remove(process)
                process.join()
                if process.exitcode and process.exitcode > 0:
                    raise RuntimeError(f"{process.name} failed with the exception above")
                if process.exitcode:  # killed by a signal
                    _give_back(study, process.name, left, retries)
                    if left.value:
                        running.append(start())
    finally:
        for process in running:
            process.terminate()
            process.join()
        _close(study)


def _work(search: "Search", left: Any) -> None:
    study = search.study()
    while _take(left):
        search.run_trial(study)


def _take(left: Any) -> bool:
    with left.get_lock():
        if left.value <= 0:
            return False
        left.value -= 1
        return True


def _give_back(study: "optuna.Study", worker: str, left: Any, retries: int) -> None:
    """Mark a killed worker's trial as failed, and enqueue its parameters again."""
    from optuna.trial import TrialState  # imported late: `Workers` needs no Optuna

    lost = [t for t in study.get_trials(states=(TrialState.RUNNING,)) if t.user_attrs.get("worker", worker) == worker]
    for trial in lost:
        study.tell(trial.number, state=TrialState.FAIL)
        tries = trial.user_attrs.get(_RETRIED, 0)
        if trial.params and tries < retries:
            study.enqueue_trial(trial.params, user_attrs={_RETRIED: tries + 1})
    with left.get_lock():
        left.value += 1


def _close(study: "optuna.Study") -> None:
    """Fail trials still marked as running when no worker is left."""
    from optuna.trial import TrialState

    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
