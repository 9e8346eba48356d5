"""A compression that follows a schedule: what it logs of a network that is not smaller yet."""

from itertools import pairwise
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback

from lightning_plugins.callbacks import MaskScheduling
from lightning_plugins.callbacks._compression.scheduled_compression import ScheduledCompression
from lightning_plugins.compression import masks_of
from tests.callbacks.budgets import BATCHES, BEGIN, END, in_steps, seeded
from tests.models import fit

CLASSES = 3


class Logged(Callback):
    """The logged share of the cost, beside the sizes that are left of the layers."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, list[int]]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        masks = masks_of(pl_module)
        left = [] if masks is None else [int(keep.sum()) for keep in masks.kept()]
        self.steps.append((float(trainer.callback_metrics["budget/params"]), left))


def parameters(left: list[int]) -> int:
    """Of linear layers with a bias, one after the other."""
    return sum((inputs + 1) * outputs for inputs, outputs in pairwise([6, *left, CLASSES]))


def test_the_logged_share_is_that_of_the_parameters_of_what_is_kept():
    logged = Logged()
    callback: ScheduledCompression = in_steps(MaskScheduling, criterion="magnitude", update_every=2)
    fit(seeded(), BATCHES, [callback, logged], max_epochs=2)
    assert [share for share, _ in logged.steps[:BEGIN]] == [1.0] * BEGIN
    for share, left in logged.steps[BEGIN:END]:
        assert share == pytest.approx(parameters(left) / parameters([16, 12, 5]))
    assert logged.steps[END - 1][0] < 0.6
