"""Training runs as the trials of a search: seeds, folders, worker processes, and the best result kept."""

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_plugins._checks import check_choice, check_instance, check_non_negative_int, check_positive_int
from lightning_plugins._grouping import Group, grouped
from lightning_plugins.search.sampler import B2EASampler, origins
from lightning_plugins.search.trainings import ENDED, Objective, Search, best_trial
from lightning_plugins.search.workers import Workers, run_workers

try:
    import optuna
except ImportError as error:
    raise ImportError("searches need Optuna; run `pip install 'lightning-plugins[search]'`") from error

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from rich.table import Table


@dataclass(frozen=True)
class TuneResult:
    """The outcome of a search.

    Attributes:
        study: Optuna's study, with all trials.
        folder: The folder of the best trial, with the files of its training; None if no trial finished.
    """

    study: "optuna.Study"
    folder: Path | None

    @property
    def best_value(self) -> float:
        """The best value."""
        return self.study.best_value

    @property
    def best_params(self) -> dict[str, Any]:
        """The parameters of the best trial."""
        return self.study.best_params

    def table(self, most: int = 20) -> "Table":
        """Return the best trials as a table, the best first.

        Args:
            most: Maximum number of rows.

        Raises:
            ImportError: If rich is missing.
        """
        try:
            from rich.table import Table
        except ImportError as error:
            raise ImportError("tables need rich; run `pip install 'lightning-plugins[cli]'`") from error
        maximise = self.study.direction == optuna.study.StudyDirection.MAXIMIZE
        trials = [trial for trial in self.study.get_trials(deepcopy=False) if trial.value is not None]
        trials.sort(key=lambda trial: trial.value or 0.0, reverse=maximise)
        table = Table(title=f"{self.study.study_name}: {len(self.study.trials)} trials")
        names = sorted({name for trial in trials for name in trial.params})
        for column in ("trial", "value", "state", "proposed by", *names):
            table.add_column(column, justify="right" if column in {"trial", "value"} else "left")
        arms = {row["number"]: row["arms"] for row in origins(self.study)}
        for trial in trials[:most]:
            shown = [_shown(trial.params.get(name, "")) for name in names]
            proposer = " then ".join(arms[trial.number]) if trial.number in arms else "chance"
            table.add_row(str(trial.number), f"{trial.value:.6g}", trial.state.name.lower(), proposer, *shown)
        return table


def _check_storage(storage: str) -> None:
    check_instance("storage", storage, str, "the URL of a storage, as in 'sqlite:///search.db'")
    if "://" not in storage:
        raise ValueError(f"`storage` must be a URL, as in 'sqlite:///search.db', got {storage!r}")


@grouped(workers=Group(Workers, main="count"))
def tune(
    objective: Objective,
    n_trials: int,
    *,
    directory: str | os.PathLike[str],
    direction: Literal["minimize", "maximize"] = "minimize",
    sampler: "BaseSampler | None" = None,
    pruner: "BasePruner | None" = None,
    storage: str | None = None,
    workers: int | Workers = 1,
    seed: int = 0,
) -> TuneResult:
    """Run a search with training runs as trials.

    ``objective(trial, folder)`` asks the trial for parameters, trains, writes results to the folder (for example with
    ``Trainer(default_root_dir=folder, ...)``) and returns a number. Random generators are seeded for each trial by
    ``seed`` and its number. Only the best trial's folder is kept. Called again with the same directory, the search
    continues until ``n_trials`` have finished.

    With several workers each is a separate process, and they share one storage. The trial of a killed worker (for
    example out of memory) is marked as failed and retried with the same parameters by another; an exception in the
    objective stops the search.

    Args:
        objective: The training; with several workers it must be picklable, a top-level function of a module.
        n_trials: The number of finished trials, including pruned ones.
        directory: Directory of trial folders and storage.
        direction: Whether to minimise or maximise the objective.
        sampler: `B2EASampler` by default.
        pruner: Pruner; by default nothing is pruned.
        storage: Optuna's storage URL; by default a journal file in the directory, for any number of workers.
        workers: The number of processes; 1 runs in this one. `Workers` also has the retries of a killed trial, by
            default one.
        seed: Seed of the trials and of the training runs.

    Returns:
        The study and the best trial's folder.

    Raises:
        TypeError: If an argument is of the wrong type, or the objective of several workers cannot be pickled.
        ValueError: If an argument is out of its range.
        RuntimeError: If a worker ended with an exception.

    Example:
        >>> import tempfile
        >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
        >>> def objective(trial, folder):
        ...     return trial.suggest_float("x", -1, 1) ** 2
        >>> result = tune(objective, 8, directory=tempfile.mkdtemp())
        >>> len(result.study.trials), result.folder.name.startswith("trial-")
        (8, True)
    """
    if not callable(objective):
        raise TypeError(f"`objective` must be a function of a trial and a folder, got {objective!r}")
    check_positive_int("n_trials", n_trials)
    check_choice("direction", direction, ("minimize", "maximize"))
    if not isinstance(workers, Workers):
        workers = Workers(count=check_positive_int("workers", workers))
    check_instance("directory", directory, (str, os.PathLike), "the path of a folder")
    if storage is not None:
        _check_storage(storage)
    if sampler is not None:
        check_instance("sampler", sampler, optuna.samplers.BaseSampler, "a sampler of Optuna's")
    if pruner is not None:
        check_instance("pruner", pruner, optuna.pruners.BasePruner, "a pruner of Optuna's")
    home = Path(directory)
    home.mkdir(parents=True, exist_ok=True)
    search = Search(
        objective=objective,
        home=home,
        storage=storage,
        name=home.resolve().name,
        sampler=sampler or B2EASampler(seed=seed),
        pruner=pruner or optuna.pruners.NopPruner(),
        seed=check_non_negative_int("seed", seed),
    )
    study = search.study(direction)
    left = n_trials - sum(trial.state in ENDED for trial in study.get_trials(deepcopy=False))
    if workers.count == 1:
        for _ in range(left):
            search.run_trial(study)
    else:
        _require_picklable(search)
        run_workers(search, study, left, workers=workers.count, retries=workers.retries)
    best = best_trial(study)
    return TuneResult(study, None if best is None else search.folder(best))


def _require_picklable(search: Search) -> None:
    try:
        pickle.dumps(search)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            "`objective` must be a function at the top of a module where `workers` are several, each a process of its "
            f"own: {error}"
        ) from error


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
