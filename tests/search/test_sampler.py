"""B2EA inside of Optuna: spaces, storage, running, pruned and failed trials, restarts."""

import multiprocessing
import time

import numpy as np
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from lightning_plugins.search import B2EASampler, origins
from lightning_plugins.search.space import Space

optuna.logging.set_verbosity(optuna.logging.WARNING)
FEW = 60  # candidates: enough to test with


def sampler(**settings):
    return B2EASampler(**{"seed": 0, "max_candidates": FEW, **settings})


def mixed(trial):
    x = trial.suggest_float("x", 1e-3, 1.0, log=True)
    y = trial.suggest_int("y", 0, 8, step=2)
    kind = trial.suggest_categorical("kind", ["a", "b"])
    return (np.log10(x) + 1) ** 2 + (y - 4) ** 2 / 10 + (kind == "a")


def open_journal(path, **settings):
    storage = JournalStorage(JournalFileBackend(str(path)))
    return optuna.create_study(study_name="s", storage=storage, sampler=sampler(**settings), load_if_exists=True)


def test_it_finds_the_minimum_of_a_mixed_space():
    study = optuna.create_study(sampler=sampler(max_candidates=500))
    study.optimize(mixed, n_trials=25)
    assert study.best_value < 0.5  # one in eleven random points is
    assert study.best_params["kind"] == "b"


def test_maximising_is_minimising_the_negative():
    low, high = (optuna.create_study(sampler=sampler(), direction=d) for d in ("minimize", "maximize"))
    low.optimize(mixed, n_trials=9)
    high.optimize(lambda trial: -mixed(trial), n_trials=9)
    assert [t.params for t in low.trials] == [t.params for t in high.trials]


@pytest.mark.parametrize("seed", [0, None])
def test_a_study_resumed_from_storage_proposes_what_the_uninterrupted_one_would(tmp_path, seed):
    straight = open_journal(tmp_path / "a.log", seed=seed)
    straight.optimize(mixed, n_trials=9)
    kept = straight._storage.get_study_system_attrs(straight._study_id).get("b2ea:seed", seed)
    for part in (4, 3, 2):
        open_journal(tmp_path / "b.log", seed=kept).optimize(mixed, n_trials=part)
    assert [t.params for t in open_journal(tmp_path / "b.log").trials] == [t.params for t in straight.trials]
    if seed is None:  # the seed is the study's: a new process goes on with it
        first = open_journal(tmp_path / "c.log", seed=None)
        first.optimize(mixed, n_trials=4)
        own = first._storage.get_study_system_attrs(first._study_id)["b2ea:seed"]
        open_journal(tmp_path / "c.log", seed=None).optimize(mixed, n_trials=3)
        again = open_journal(tmp_path / "d.log", seed=own)
        again.optimize(mixed, n_trials=7)
        assert [t.params for t in again.trials] == [t.params for t in open_journal(tmp_path / "c.log").trials]


def test_studies_without_a_seed_draw_theirs_from_a_wide_range():
    studies = [optuna.create_study(sampler=sampler(seed=None)) for _ in range(20)]
    assert max(study.sampler._seed_of(study) for study in studies) > 2**20  # by chance wrong once in 10**66


def test_other_seeds_choose_other_trials():
    studies = [optuna.create_study(sampler=sampler(seed=seed)) for seed in (0, 1)]
    for study in studies:
        study.optimize(mixed, n_trials=4)
    assert [t.params for t in studies[0].trials] != [t.params for t in studies[1].trials]


def test_no_point_of_a_finite_space_is_tried_twice_before_all_were():
    study = optuna.create_study(sampler=sampler())
    study.optimize(lambda t: t.suggest_int("a", 0, 4) + t.suggest_categorical("b", [0, 1, 2]), n_trials=17)
    tried = [tuple(t.params.values()) for t in study.trials]
    assert len(set(tried[:15])) == 15
    assert len(set(tried)) == 15


def test_running_trials_are_not_tried_beside():
    study = optuna.create_study(sampler=sampler())
    study.optimize(lambda t: t.suggest_int("a", 0, 6), n_trials=2)
    asked = [study.ask() for _ in range(5)]
    values = [t.suggest_int("a", 0, 6) for t in asked]
    assert len({*values, *(t.params["a"] for t in study.trials[:2])}) == 7


def history_of(study, **settings):
    trial = study.ask()
    space = Space({"x": optuna.distributions.FloatDistribution(0, 1)})
    return sampler(**settings)._history(study, study._storage.get_trial(trial._trial_id), space)


def all_states():
    distribution = {"x": optuna.distributions.FloatDistribution(0, 1)}
    study = optuna.create_study(sampler=sampler())
    trials = [
        create_trial(params={"x": 0.1}, distributions=distribution, value=1.0),
        create_trial(params={"x": 0.2}, distributions=distribution, value=5.0),
        create_trial(
            params={"x": 0.3}, distributions=distribution, state=TrialState.PRUNED, intermediate_values={0: 9.0, 4: 3.0}
        ),
        create_trial(params={"x": 0.4}, distributions=distribution, state=TrialState.PRUNED),
        create_trial(params={"x": 0.5}, distributions=distribution, state=TrialState.FAIL),
        create_trial(params={"x": 0.6}, distributions=distribution, value=float("inf")),
        create_trial(params={}, distributions={}, value=0.0),
    ]
    study.add_trials(trials)
    return study


@pytest.mark.parametrize(
    ("settings", "points", "values"),
    [
        ({}, [0.1, 0.2, 0.3, 0.6], [1, 5, 3, 5]),
        ({"pruned": "skip"}, [0.1, 0.2, 0.6], [1, 5, 5]),
        ({"failed": "worst"}, [0.1, 0.2, 0.3, 0.5, 0.6], [1, 5, 3, 5, 5]),
    ],
)
def test_what_counts_as_an_observation(settings, points, values):
    study = all_states()
    found = history_of(study, **settings)
    np.testing.assert_allclose(found.points[: len(points), 0], points)
    np.testing.assert_allclose(found.values[: len(points)], values)


def test_running_trials_count_with_the_worst_value():
    study = optuna.create_study(sampler=sampler())
    study.optimize(lambda t: 10 * t.suggest_float("x", 0, 1), n_trials=3)
    study.ask().suggest_float("x", 0, 1)
    found = history_of(study)
    assert len(found.values) == 4
    assert found.values[-1] == max(t.value for t in study.trials[:3])


def test_parameters_that_come_and_go_are_drawn_at_random(recwarn):
    def objective(trial):
        kind = trial.suggest_categorical("kind", ["one", "two"])
        extra = trial.suggest_float("extra", 0, 1) if kind == "two" else 0.5
        return trial.suggest_float("x", -1, 1) ** 2 + extra

    study = optuna.create_study(sampler=sampler())
    study.optimize(objective, n_trials=12)
    assert len(study.trials) == 12
    assert {t.params["kind"] for t in study.trials} == {"one", "two"}
    models = [row for row in origins(study) if row["number"] >= 2]
    assert len(models) == 10


def test_origins_name_the_arms():
    study = optuna.create_study(sampler=sampler())
    study.optimize(mixed, n_trials=6)
    rows = origins(study)
    assert [row["number"] for row in rows] == [2, 3, 4, 5]
    assert [row["arms"][0] for row in rows] == ["forest+ucb", "gp+ei", "gp+pi", "gp+ucb"]
    assert all(row["arms"][0] != row["arms"][1] for row in rows)


def test_several_objectives_are_refused():
    study = optuna.create_study(directions=["minimize", "maximize"], sampler=sampler())
    with pytest.raises(ValueError, match=r"one objective, got a study of 2; for several use `optuna\.samplers\.NSGA"):
        study.optimize(lambda t: (t.suggest_float("x", 0, 1), 0.0), n_trials=1)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"n_startup_trials": 1}, ValueError, "`n_startup_trials` must be at least 2"),
        ({"n_startup_trials": 2.0}, TypeError, "`n_startup_trials` must be an int"),
        ({"seed": -1}, ValueError, "`seed` must be at least 0"),
        ({"seed": "a"}, TypeError, "`seed` must be an int"),
        ({"pruned": "observed"}, ValueError, r"`pruned` must be .*did you mean 'observe'"),
        ({"failed": "bad"}, ValueError, "`failed` must be"),
        ({"transform": "no"}, TypeError, "`transform` must be True or False"),
        ({"max_candidates": 0}, ValueError, "`max_candidates` must be at least 1"),
    ],
)
def test_bad_arguments_are_named(settings, error, match):
    with pytest.raises(error, match=match):
        B2EASampler(**settings)


def work(path, count):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    open_journal(path).optimize(lambda t: (time.sleep(0.01), t.suggest_int("a", 0, 30))[1], n_trials=count)


@pytest.mark.distributed
def test_two_processes_over_one_storage_try_different_points(tmp_path):
    open_journal(tmp_path / "j.log").optimize(lambda t: t.suggest_int("a", 0, 30), n_trials=2)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(tmp_path / "j.log", 5)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        assert process.exitcode == 0
    trials = open_journal(tmp_path / "j.log").trials
    assert len(trials) == 12
    assert len({t.params["a"] for t in trials}) == 12
