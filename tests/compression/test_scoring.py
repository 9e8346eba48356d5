"""Shares of the processes in the scoring of candidates."""

from types import SimpleNamespace

import pytest
from torch import nn

from lightning_plugins.compression.rank_search import scoring
from lightning_plugins.compression.rank_search.scoring import CandidateScores


@pytest.mark.parametrize(
    ("members", "portions"),
    [
        # The first runs three layers; each of the next only the last one, since it shares two with the one before it.
        ([(1, 1, 1), (1, 1, 2), (1, 1, 3), (1, 1, 4)], [1, 3]),
        ([(1, 1, 1), (2, 1, 1), (3, 1, 1), (4, 1, 1)], [2, 2]),
    ],
    ids=["last layer", "first layer"],
)
def test_processes_have_as_many_layers_to_run_not_as_many_candidates(members, portions, monkeypatch):
    reuse = SimpleNamespace(first_calls=lambda: {"a": 0, "b": 1, "c": 2})
    scores = CandidateScores(nn.Module(), [], lambda *_: 0.0, SimpleNamespace(), reuse, None)
    monkeypatch.setattr(scoring, "is_distributed", lambda: True)
    monkeypatch.setattr(scoring, "world_size", lambda: 2)
    shared = []
    for rank in range(2):
        monkeypatch.setattr(scoring.dist, "get_rank", lambda rank=rank: rank)
        shared.append(list(scores._portion(members)))
    assert [len(portion) for portion in shared] == portions
    assert [*shared[0], *shared[1]] == members
