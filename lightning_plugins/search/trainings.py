"""Training runs as trials: their folders and seeds, and the results to keep."""

import multiprocessing
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_plugins._lightning import seed_everything

try:
    import optuna
    from optuna.trial import TrialState
except ImportError as error:
    raise ImportError("searches need Optuna; run `pip install 'lightning-plugins[search]'`") from error

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import Trial

Objective = Callable[["Trial", Path], float]
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Search:
    """Settings needed by every worker of a search."""

    objective: Objective
    home: Path
    storage: str | None
    name: str
    sampler: "BaseSampler"
    pruner: "BasePruner"
    seed: int

    def study(self, direction: Literal["minimize", "maximize"] | None = None) -> "optuna.Study":
        """Open the study; create it first if a direction is given."""
        storage: Any = self.storage
        if storage is None:
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend

            storage = JournalStorage(JournalFileBackend(str(self.home / "journal.log")))
        if direction is None:
            return optuna.load_study(study_name=self.name, storage=storage, sampler=self.sampler, pruner=self.pruner)
        return optuna.create_study(
            study_name=self.name,
            storage=storage,
            sampler=self.sampler,
            pruner=self.pruner,
            direction=direction,
            load_if_exists=True,
        )

    def run_trial(self, study: "optuna.Study") -> None:
        """Run one trial, and keep its folder only if it is the best so far."""
        study.optimize(self._train, n_trials=1)
        best = best_trial(study)
        for folder in self.home.glob("trial-*"):
            number = int(folder.name.removeprefix("trial-"))
            if number != best and study.trials[number].state.is_finished():
                shutil.rmtree(folder, ignore_errors=True)  # another worker may be doing the same

    def folder(self, number: int) -> Path:
        """Return the folder of a trial."""
        return self.home / f"trial-{number:04d}"

    def _train(self, trial: "Trial") -> float:
        trial.set_user_attr("worker", multiprocessing.current_process().name)
        folder = self.folder(trial.number)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        seed_everything(self.seed + trial.number, workers=True, verbose=False)
        return float(self.objective(trial, folder))


def best_trial(study: "optuna.Study") -> int | None:
    """Return the number of the best trial; None if none is complete."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return study.best_trial.number if complete else None
