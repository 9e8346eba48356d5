"""Early termination: the decision, the same on all processes, with Optuna and with a file of curves."""

import json

import optuna
import pytest
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from optuna.trial import TrialState

from lightning_plugins.callbacks import EarlyTermination
from lightning_plugins.search import TercetPruner, TercetRule
from lightning_plugins.search.shared_trial import SharedTrial, finish_trial, shared_trials
from tests._processes import run_on_ranks
from tests.contract_ranks import act_as_rank
from tests.models import Batches, Classifier, fit, make_batches

optuna.logging.set_verbosity(optuna.logging.WARNING)
GOOD = [[1.0 - 0.1 * epoch for epoch in range(8)]] * 5


class Curve(Classifier):
    """Its validation gives the values it is told, one an epoch."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def validation_step(self, batch, batch_idx):
        self.log("val", self.values[self.current_epoch])


def train(values, callback, epochs=8, **settings):
    return fit(
        Curve(values),
        Batches(make_batches(2)),
        [callback],
        validation=Batches(make_batches(1)),
        max_epochs=epochs,
        **settings,
    )


def write(path, curves):
    path.write_text("".join(json.dumps(curve) + "\n" for curve in curves))


def test_a_hopeless_training_ends_at_half(tmp_path):
    path = tmp_path / "curves.jsonl"
    write(path, GOOD)
    callback = EarlyTermination("val", history=path)
    trainer = train([5.0] * 8, callback)
    assert callback.ended
    assert trainer.current_epoch == 4
    assert callback.curve == [5.0] * 4
    assert [json.loads(line) for line in path.read_text().splitlines()] == [*GOOD, [5.0] * 4]


def test_a_good_training_comes_to_its_end_and_adds_its_curve(tmp_path):
    path = tmp_path / "new" / "curves.jsonl"
    for _ in range(2):
        callback = EarlyTermination("val", history=path)
        assert train(GOOD[0], callback).current_epoch == 8
        assert not callback.ended
        callback.raise_if_ended()
    curves = [json.loads(line) for line in path.read_text().splitlines()]
    assert [len(curve) for curve in curves] == [8, 8]
    assert curves[0] == pytest.approx(GOOD[0])


def test_half_a_line_of_the_file_is_passed_over_with_a_warning(tmp_path):
    path = tmp_path / "curves.jsonl"
    write(path, GOOD)
    path.write_text(path.read_text() + '[1.0, 0.9\n{"a": 1}\n')
    callback = EarlyTermination("val", history=path)
    with pytest.warns(UserWarning, match="line 6 of .* is not an array of numbers"):
        train([5.0] * 8, callback)
    assert callback.ended


def test_the_total_counts_validations(tmp_path):
    path = tmp_path / "curves.jsonl"
    write(path, GOOD)
    callback = EarlyTermination("val", history=path, rule=TercetRule((0.5,), (0.1,)))
    trainer = train([5.0] * 16, callback, epochs=16, check_val_every_n_epoch=2)
    assert trainer.current_epoch == 8  # behind the fourth of eight validations


def test_a_resumed_training_has_the_curve_of_the_uninterrupted_one(tmp_path):
    path = tmp_path / "curves.jsonl"
    write(path, GOOD)
    train([5.0] * 8, EarlyTermination("val", history=tmp_path / "other.jsonl"), epochs=3).save_checkpoint(
        tmp_path / "third.ckpt"
    )
    callback = EarlyTermination("val", history=path)
    trainer = train([5.0] * 8, callback, ckpt_path=tmp_path / "third.ckpt")
    assert callback.curve == [5.0] * 4
    assert (callback.ended, trainer.current_epoch) == (True, 4)


def test_with_a_trial_the_study_decides_and_the_trial_is_pruned_behind_fit():
    study = optuna.create_study(pruner=TercetPruner(8, min_trials=3))
    for _ in range(3):
        trial = study.ask()
        for step, value in enumerate(GOOD[0]):
            trial.report(value, step)
        study.tell(trial, GOOD[0][-1])
    trial = study.ask()
    callback = EarlyTermination("val", trial=trial)
    assert train([5.0] * 8, callback).current_epoch == 4
    with pytest.raises(optuna.TrialPruned, match=r"stopped after validation 4 with val = 5\.0"):
        callback.raise_if_ended()
    assert study.trials[3].intermediate_values == dict.fromkeys(range(4), 5.0)


def test_sanity_checks_and_fast_runs_report_nothing_extra(tmp_path):
    callback = EarlyTermination("val", history=tmp_path / "curves.jsonl")
    train([1.0] * 8, callback, epochs=2, num_sanity_val_steps=1)
    assert len(callback.curve) == 2
    train([1.0] * 8, callback, fast_dev_run=True)
    assert len(callback.curve) == 1


def test_an_error_of_the_storage_is_raised_by_name():
    class Broken:
        def should_prune(self):
            raise OSError("disk gone")

        def report(self, value, step):
            pass

    with pytest.raises(RuntimeError, match="could not decide on the first process: OSError: disk gone"):
        train([1.0] * 8, EarlyTermination("val", trial=Broken()))


class NoValidation(LightningModule):
    training_step = Classifier.training_step


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"monitor": ""}, TypeError, "`monitor` must be the name"),
        ({"monitor": None}, TypeError, "`monitor` must be the name"),
        ({"trial": 3}, TypeError, "`trial` must be an Optuna trial, got 3"),
        ({"history": 3}, TypeError, "`history` must be a path"),
        ({"rule": TercetRule()}, ValueError, "`rule` decides against a `history`"),
        ({"history": "a", "rule": "tercet"}, TypeError, "`rule` must be a TercetRule"),
        ({"history": "a", "total": 0}, ValueError, "`total` must be at least 1"),
        ({"history": "a", "trial": SharedTrial}, ValueError, "two ways to decide"),
    ],
)
def test_bad_arguments_are_named(arguments, error, match):
    with pytest.raises(error, match=match):
        EarlyTermination(**{"monitor": "val", **arguments})


def test_trainings_that_cannot_be_decided_on_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="needs a `trial` or a `history`"):
        train([1.0], EarlyTermination("val"))
    with pytest.raises(MisconfigurationException, match="pass `total`"):
        train([1.0], EarlyTermination("val", history=tmp_path / "c"), epochs=-1, max_steps=2)
    with pytest.raises(
        MisconfigurationException, match=r"`monitor` must be a logged metric, one of \['val'\], got 'vl'"
    ):
        train([1.0], EarlyTermination("vl", history=tmp_path / "c"), epochs=1)
    with pytest.raises(MisconfigurationException, match="has no `validation_step`"):
        EarlyTermination("val", history=tmp_path / "c").setup(
            type("T", (), {"is_global_zero": True})(), NoValidation(), "fit"
        )


def search_on_a_rank(rank, path):
    """Three trials under DDP: the second one is ended, and the third one starts."""
    act_as_rank(rank, 2)
    study = None
    if rank == 0:
        study = optuna.create_study(storage=f"sqlite:///{path}", pruner=TercetPruner(8, min_trials=1))
    seen = []
    for trial in shared_trials(study, 3):
        values = [GOOD[0], [5.0] * 8, GOOD[0]][trial.number]
        slope = trial.suggest_float("slope", 0, 1)
        callback = EarlyTermination("val", trial=trial.trial)
        trainer = train(values, callback, strategy="ddp", devices=2, use_distributed_sampler=False)
        try:
            callback.raise_if_ended()
            pruned = False
        except optuna.TrialPruned:
            pruned = True
        finish_trial(study, trial, values[-1], pruned=pruned)
        seen.append((trial.number, slope, trainer.current_epoch, pruned))
    dist.barrier()
    states = [] if study is None else [t.state for t in study.trials]
    return seen, states


@pytest.mark.distributed
def test_two_processes_stop_at_the_same_epoch_and_the_next_trial_starts(tmp_path):
    (first, states), (second, _) = run_on_ranks(search_on_a_rank, 2, tmp_path, tmp_path / "study.db")
    assert first == second
    assert [(epoch, pruned) for _, _, epoch, pruned in first] == [(8, False), (4, True), (8, False)]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE]


def broken_on_a_rank(rank):
    class Study:
        def ask(self):
            raise OSError("no storage")

    try:
        next(iter(shared_trials(Study() if rank == 0 else None, 1)))
    except OSError as error:
        return str(error)


@pytest.mark.distributed
def test_an_error_on_the_first_process_is_raised_on_all(tmp_path):
    assert run_on_ranks(broken_on_a_rank, 2, tmp_path) == ["no storage", "no storage"]
