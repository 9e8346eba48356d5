"""Worker processes of a search, as the process that started them sees them."""

import multiprocessing
import time

import optuna

from lightning_plugins.search import workers


class Naps:
    """In place of a search: a trial does nothing for a while."""

    def study(self):
        return None

    def run_trial(self, study):
        time.sleep(0.1)


def test_the_search_sleeps_until_a_worker_ends(monkeypatch):
    woken, wait, fork = [], workers.wait, multiprocessing.get_context("fork")  # in which nothing is imported again

    def counted(ends):
        assert len(woken) < 20  # woken again and again by a worker that has ended
        woken.append(wait(ends))
        return woken[-1]

    monkeypatch.setattr(workers, "wait", counted)
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda method: fork)
    workers.run_workers(Naps(), optuna.create_study(), 3, workers=2, retries=0)
    assert 1 <= len(woken) <= 2  # both may end at once
    assert sum(map(len, woken)) == 2
