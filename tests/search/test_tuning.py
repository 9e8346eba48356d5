"""Trainings as trials: folders, seeds, restarts, worker processes of which one is killed."""

import os
import signal
import time

import optuna
import pytest
import torch
from lightning.pytorch import Trainer
from optuna.trial import TrialState

from lightning_plugins.callbacks import EarlyTermination
from lightning_plugins.search import TercetPruner, Workers, tune
from tests.models import Batches, Classifier, make_batches

optuna.logging.set_verbosity(optuna.logging.WARNING)
RANDOM = {"sampler": optuna.samplers.RandomSampler(seed=0)}


def squared(trial, folder):
    x = trial.suggest_float("x", -1, 1)
    (folder / "weights.txt").write_text(f"{x} {torch.rand(1).item()}")
    return x**2


def train(trial, folder):
    model = Classifier(lr=trial.suggest_float("lr", 1e-3, 1.0, log=True))
    callback = EarlyTermination("val_loss", trial=trial)
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback],
        num_sanity_val_steps=0,
    )
    trainer.fit(model, Batches(make_batches(2)), Batches(make_batches(1, seed=1)))
    callback.raise_if_ended()
    return float(trainer.callback_metrics["val_loss"])


def test_the_best_training_is_kept(tmp_path):
    result = tune(squared, 9, directory=tmp_path)
    assert len(result.study.trials) == 9
    assert [path.name for path in tmp_path.glob("trial-*")] == [result.folder.name]
    kept = float((result.folder / "weights.txt").read_text().split()[0])
    assert kept == result.best_params["x"]
    assert result.best_value == kept**2 == min(t.value for t in result.study.trials)


def test_every_trial_has_a_seed_of_its_own(tmp_path):
    drawn = []
    for name in ("a", "b"):
        seen = []
        tune(lambda t, f, seen=seen: seen.append(torch.rand(1).item()) or squared(t, f), 4, directory=tmp_path / name)
        drawn.append(seen)
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 4


def test_a_search_goes_on_where_it_stopped(tmp_path):
    tune(squared, 4, directory=tmp_path / "parts" / "s")
    result = tune(squared, 7, directory=tmp_path / "parts" / "s")
    straight = tune(squared, 7, directory=tmp_path / "whole" / "s")
    assert [t.params for t in result.study.trials] == [t.params for t in straight.study.trials]
    assert len(tune(squared, 7, directory=tmp_path / "parts" / "s").study.trials) == 7


def test_trainings_are_ended_early_and_the_best_checkpoint_is_kept(tmp_path):
    result = tune(train, 8, directory=tmp_path, pruner=TercetPruner(4, min_trials=2), **RANDOM)
    states = [t.state for t in result.study.trials]
    assert states.count(TrialState.PRUNED) >= 1
    assert len(states) == 8
    assert list(result.folder.rglob("*.ckpt"))
    assert all(len(t.intermediate_values) < 4 for t in result.study.trials if t.state == TrialState.PRUNED)
    table = result.table(3)
    assert table.row_count == 3
    assert [column.header for column in table.columns] == ["trial", "value", "state", "proposed by", "lr"]


def test_an_exception_of_the_objective_ends_the_search(tmp_path):
    def broken(trial, folder):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        tune(broken, 3, directory=tmp_path)


def slow(trial, folder):
    """Kills itself, as a system without memory would, when it meets the mark for the first time."""
    x = trial.suggest_int("x", 0, 40)
    mark = folder.parent / "killed"
    if not mark.exists() and trial.number == 2:
        mark.write_text(str(x))
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return float(x)


def bad(trial, folder):
    raise ValueError("always")


@pytest.mark.distributed
def test_a_killed_worker_loses_no_trial(tmp_path):
    result = tune(slow, 10, directory=tmp_path, workers=2, **RANDOM)
    trials = result.study.trials
    by_state = {state: [t for t in trials if t.state == state] for state in TrialState}
    assert len(by_state[TrialState.COMPLETE]) == 10
    (lost,) = by_state[TrialState.FAIL]
    assert not by_state[TrialState.RUNNING]
    assert not by_state[TrialState.WAITING]
    killed = int((tmp_path / "killed").read_text())
    assert lost.params == {"x": killed}
    (again,) = [t for t in by_state[TrialState.COMPLETE] if t.user_attrs.get("retried")]
    assert again.params == {"x": killed}
    assert len({t.user_attrs["worker"] for t in trials}) >= 2


@pytest.mark.distributed
def test_an_exception_in_a_worker_ends_the_search(tmp_path):
    with pytest.raises(RuntimeError, match=r"worker-\d failed with the exception above"):
        tune(bad, 4, directory=tmp_path, workers=2)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"objective": 3}, TypeError, "`objective` must be a function"),
        ({"n_trials": 0}, ValueError, "`n_trials` must be at least 1"),
        ({"direction": "maximum"}, ValueError, "`direction` must be .*did you mean 'maximize'"),
        ({"workers": 0}, ValueError, "`workers` must be at least 1"),
        ({"seed": 0.5}, TypeError, "`seed` must be an int"),
        (
            {"objective": lambda t, f: 0.0, "workers": 2},
            TypeError,
            "`objective` must be a function at the top of a module",
        ),
    ],
)
def test_bad_arguments_are_named(change, error, match, tmp_path):
    arguments = {"objective": squared, "n_trials": 2, "directory": tmp_path, **change}
    with pytest.raises(error, match=match):
        tune(arguments.pop("objective"), arguments.pop("n_trials"), **arguments)


@pytest.mark.parametrize(("field", "least", "number"), [("count", 1, 0), ("retries", 0, -1)])
def test_bad_fields_of_workers_are_named(field, least, number):
    with pytest.raises(ValueError, match=f"`{field}` must be at least {least}, got {number}"):
        Workers(**{field: number})
