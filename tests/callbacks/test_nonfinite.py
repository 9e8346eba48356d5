import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_plugins.callbacks import VNERegularization
from tests.models import Classifier, fit, make_batches

BATCHES = make_batches(2)


class Spoiled(Classifier):
    """Runs a layer that only the term sees; its features are NaN in some steps, the gradient before them is not."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self.side = nn.Sequential(nn.Linear(6, 4), Spoils(lambda: self.global_step in steps))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.side(batch[0])
        return self.loss(batch)


class Spoils(nn.Module):
    def __init__(self, now: Any) -> None:
        super().__init__()
        self.now = now

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(torch.tensor(self.now()), math.nan, x)


def test_features_that_are_always_nan_leave_the_training_as_it_is():
    torch.manual_seed(0)
    model = Spoiled(0, 1, 2, 3)
    torch.manual_seed(0)
    plain = Spoiled()
    with pytest.warns(
        UserWarning, match="vne: 2 term.s. were NaN or infinite and left out of the loss so far; the log"
    ):
        fit(model, BATCHES, [VNERegularization("side", weight=0.3)])
    fit(plain, BATCHES)
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)


def test_nan_rows_are_not_remembered():
    callback = VNERegularization("side", weight=0.3, queue_size=64)
    with pytest.warns(UserWarning, match="vne: 1 term"):
        fit(Spoiled(1), BATCHES, [callback], max_epochs=3)
    state = callback.state_dict()
    assert state["skipped"] == 1
    norms = state["queues"]["side"].norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([1.0] * 8 + [0.0] * 8 + [1.0] * 32, dtype=torch.float64))


def test_a_new_training_counts_anew_and_warns_again():
    callback = VNERegularization("side", weight=0.3)
    for _ in range(2):
        with pytest.warns(UserWarning, match="vne: 2 term"):
            fit(Spoiled(0, 1, 2), BATCHES, [callback])
        assert callback.state_dict()["skipped"] == 3


def test_the_count_goes_on_after_a_resume():
    callback = VNERegularization("side", weight=0.3)
    callback.load_state_dict({"queues": {}, "skipped": 5})
    assert callback.state_dict()["skipped"] == 5
