"""One unit in every quotient: how far a training has come under automatic and manual optimization."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_plugins.callbacks import RepresentationMonitor, SpectrumMonitor, StableRankRegularization
from lightning_plugins.schedules import Linear
from tests.models import Classifier, fit, make_batches


class Adversaries(Classifier):
    """Two optimizers that step in every batch."""

    def __init__(self, every: int = 1, optimizers: int = 2) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.every, self.number = every, optimizers

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        loss = self.loss(batch)
        self.manual_backward(loss)
        if (batch_idx + 1) % self.every == 0:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return loss.detach()

    def configure_optimizers(self) -> Any:
        parts: list[nn.Module] = [self.backbone, self.head][: self.number]
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in parts]


class Watches(StableRankRegularization):
    def __init__(self, unit: Any = "fraction", **settings: Any) -> None:
        super().__init__("backbone.0", 0.1, schedule=Linear(0.0, 1.0, unit=unit, **settings))
        self.seen: list[float] = []

    def _factor(self, trainer: Any) -> float:
        self.seen.append(super()._factor(trainer))
        return self.seen[-1]


CASES = {
    "one optimizer": (Classifier, {}, [i / 8 for i in range(8)]),
    "two optimizers": (Adversaries, {}, [i / 8 for i in range(8)]),
    "own accumulation": (lambda: Adversaries(4, 1), {}, [3 / 8, 7 / 8]),
    "two optimizers, own accumulation": (lambda: Adversaries(2), {}, [1 / 8, 3 / 8, 5 / 8, 7 / 8]),
    "two optimizers, max_steps": (Adversaries, {"max_steps": 8, "max_epochs": -1}, [0, 0.25, 0.5, 0.75]),
    "two optimizers, both limits": (Adversaries, {"max_steps": 100}, [i / 8 for i in range(8)]),
    "accumulation": (Classifier, {"accumulate_grad_batches": 2}, [0, 0.25, 0.5, 0.75]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fraction_runs_from_zero_to_one(case: str):
    model, settings, expected = CASES[case]
    callback = Watches()
    fit(model(), make_batches(4), [callback], **settings)
    assert callback.seen == pytest.approx(expected)


def test_steps_count_batches_where_several_optimizers_step():
    callback = Watches("steps", until=8)
    fit(Adversaries(), make_batches(4), [callback])
    assert callback.seen == pytest.approx([i / 8 for i in range(8)])


def test_the_axis_of_the_monitors_is_that_of_the_loggers():
    spectra = SpectrumMonitor("head", every_n_steps=2, figures=False)
    rows = RepresentationMonitor("head", every_n_steps=3, metrics=["entropy"], figures=False)
    fit(Adversaries(), make_batches(4), [spectra, rows])
    assert list(spectra.spectra["head"]) == [0, 2, 4, 6, 8]
    assert list(rows.spectra["train"]["head"]) == [4, 8]
