"""The benchmarks of searches at a tiny size: learning curves, replayed searches, and the sampler's time."""

import importlib
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch

from lightning_plugins.search import TercetRule

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # the scripts import their neighbours as they do when they are run
curves = importlib.import_module("learning_curves")
replay = importlib.import_module("early_termination")
overhead = importlib.import_module("search_overhead")

optuna.logging.set_verbosity(optuna.logging.ERROR)
SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "width": 10, "batch_size": 64, "dropout": 0.1}


def table(rows: int, epochs: int = 10) -> np.ndarray:
    """Noisy falling curves."""
    rng = np.random.default_rng(0)
    level, noise = rng.integers(10, 400, rows)[:, None], rng.integers(0, 40, (rows, epochs))
    return level + 200 // np.arange(1, epochs + 1) + noise


def test_padding_changes_no_output():
    torch.manual_seed(0)
    padded = curves.initial_weights(SETTINGS)
    small = [weight[: (64, 10, 10)[i // 2]] if i % 2 == 0 else weight for i, weight in enumerate(padded)]
    small = [weight[:, :10][None] for weight in small]
    images = torch.rand(1, 5, 64)
    torch.testing.assert_close(curves.forward([w[None] for w in padded], images), curves.forward(small, images))


def test_networks_side_by_side_learn_and_the_diverged_one_harms_no_other():
    data = curves.digits()
    group = [{**SETTINGS, "width": 48}, {**SETTINGS, "lr": 1e4}, {**SETTINGS, "lr": 0.0}]
    good, diverged, still = curves.train(group, data, seed=0, epochs=6)
    assert len(good) == 6
    assert good[-1] < 200 < 700 < min(diverged[-1], still[0])
    assert len(set(still)) == 1


def test_a_table_that_is_stored_is_the_one_that_is_read(tmp_path: Path):
    path = tmp_path / "curves.json"
    stored = {"machine": "m", "names": ["lr"], "images": 7, "rows": {1: {"settings": [0.1], "wrong": [3]}, 0: {}}}
    curves.save(stored, path)
    assert curves.load(path) == stored


def test_a_replayed_search_ends_what_the_rule_ends():
    known, rule = table(40), TercetRule(mode="min")
    found = replay.search(known, replay.OURS, seed=3, limit=10**6)
    seen: list[list[float]] = []
    for row, epochs in zip(replay.order(40, 3), found["epochs"], strict=True):
        curve = known[row].tolist()
        ends = [rule.ends(curve[:epoch], seen, 10) for epoch in range(1, 10)]
        assert epochs == (ends.index(True) + 1 if True in ends else 10)
        seen.append(curve[:epochs])
    assert 5 in found["epochs"]
    assert 9 in found["epochs"]


@pytest.mark.parametrize("method", list(replay.METHODS))
def test_regret_of_a_search_and_its_end(method: str):
    known = table(60)
    found = replay.search(known, method, seed=0, limit=200)
    assert sum(found["epochs"][:-1]) < 200
    falls = [replay.regret(known, found["complete"], spent) for spent in range(0, 201, 10)]
    assert falls == sorted(falls, reverse=True)
    summary = replay.outcome(known, found, 0)
    assert summary["ended"] == sum(epochs < 10 for epochs in found["epochs"])
    if method == replay.NONE:
        rows = replay.order(60, 0)[:20]
        assert (summary["lost"], summary["missed"], summary["trainings"]) == (0, 0, 20)
        assert falls[-1] == known[rows, -1].min() - known[:, -1].min()


def test_the_page_and_the_figure_of_what_is_stored(tmp_path: Path):
    known = table(60, epochs=40)
    searches = {m: {str(seed): replay.search(known, m, seed, 400) for seed in range(2)} for m in replay.METHODS}
    read = {"machine": "m", "images": 500, "curves": known}
    text = replay.page({"machine": "n", "searches": searches}, read)
    assert all(text.count(f"| {method}") >= 3 for method in replay.METHODS)
    replay.draw({"searches": searches}, read, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_time_and_memory_of_few_trials():
    seconds, sizes = overhead.times(4, timed=2), overhead.memory((2, 3))
    assert all(each > 0 for each in seconds)
    assert list(sizes) == ["2", "3"]
    assert min(sizes.values()) > 10
    text = overhead.page({"machines": {"seconds": "m", "memory": "n"}, "seconds": {"4": seconds}, "memory": sizes})
    assert "| 4 " in text
