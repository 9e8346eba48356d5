"""Names that do not collide, penalties that add up, and steps that fetch their batches themselves."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_plugins.callbacks import (
    Readout,
    RepresentationMonitor,
    SpectrumMonitor,
    StableRankRegularization,
    VNERegularization,
)
from lightning_plugins.mixins import StableRankMixin, VNEMixin
from tests.models import Batches, Classifier, entropy_by_autograd, fit, make_batches


def log_of(model: Any, *callbacks: Any, batches: Any = None, **settings: Any) -> dict[str, float]:
    trainer = fit(model, batches or make_batches(1), callbacks, max_epochs=1, **settings)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_two_sides_of_a_layer_are_logged_under_two_names():
    torch.manual_seed(0)
    model, x = Classifier(lr=0.0), make_batches(1)[0][0].double()
    logged = log_of(model, VNERegularization("head", 0.1), VNERegularization("head:input", 0.2))
    outer, inner = entropy_by_autograd(model(x)), entropy_by_autograd(model.backbone(x))
    assert logged["vne/head/entropy"] == pytest.approx(outer.item())
    assert logged["vne/head.input/entropy"] == pytest.approx(inner.item())
    assert logged["vne/penalty"] == pytest.approx(-(0.1 * outer + 0.2 * inner).item())


@pytest.mark.parametrize(
    ("one", "other", "names"),
    [
        (
            lambda: VNERegularization("head:input", 0.1),
            lambda: VNERegularization("head:input", 0.1, readout=Readout(pool=lambda x: x[:, :2])),
            ["vne/head/entropy", "vne/head.input/entropy"],
        ),
        (
            lambda: RepresentationMonitor("head", every_n_steps=1, metrics=["entropy"], figures=False),
            lambda: RepresentationMonitor("head:input", every_n_steps=1, metrics=["entropy"], figures=False),
            ["representation/train/head/entropy", "representation/train/head.input/entropy"],
        ),
        (
            lambda: StableRankRegularization("head", 0.1),
            lambda: StableRankRegularization("head", 0.1, rank=2),
            ["stable_rank/head", "stable_rank/head.2"],
        ),
        (
            lambda: SpectrumMonitor("head", every_n_steps=1, figures=False),
            lambda: SpectrumMonitor("*", every_n_steps=1, figures=False),
            ["spectrum/head/stable_rank", "spectrum/head.2/stable_rank"],
        ),
    ],
    ids=["pool", "monitor", "rank", "spectrum"],
)
def test_two_callbacks_never_share_a_name(one: Any, other: Any, names: list[str]):
    logged = log_of(Classifier(), one(), other())
    assert set(names) <= set(logged)
    model = Classifier()
    log_of(model, one(), other())
    assert names[0] in log_of(model, other())  # a second training takes them anew


def test_penalties_of_all_callbacks_of_weights_are_summed():
    first, second = StableRankRegularization("head", 0.1), StableRankRegularization("backbone.0", 0.2, rank=2)
    logged = log_of(Classifier(), first, second)
    expected = 0.1 * logged["stable_rank/head"] + 0.2 * logged["stable_rank/backbone.0"]
    assert logged["stable_rank/penalty"] == pytest.approx(expected)


class TwoTerms(VNEMixin, StableRankMixin, Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inner, outer = self.backbone[0](batch[0]), self.backbone(batch[0])
        loss = (
            self.loss(batch) + self.vne_penalty(inner, 0.1, name="inner") + self.vne_penalty(outer, 0.2, name="outer")
        )
        loss = loss + self.stable_rank_penalty("head", 0.1, log=True)
        return loss + self.stable_rank_penalty("backbone.0", 0.2, log=True)


def test_penalties_of_several_mixin_terms_and_of_a_callback_are_summed():
    logged = log_of(TwoTerms(), VNERegularization("head", 0.3), batches=make_batches(3))
    parts = 0.1 * logged["vne/inner/entropy"] + 0.2 * logged["vne/outer/entropy"] + 0.3 * logged["vne/head/entropy"]
    assert logged["vne/penalty"] == pytest.approx(-parts)
    expected = 0.1 * logged["stable_rank/head"] + 0.2 * logged["stable_rank/backbone.0"]
    assert logged["stable_rank/penalty"] == pytest.approx(expected)


class Fetches(TwoTerms):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step([batch[0].double(), batch[1]], batch_idx)

    def validation_step(self, dataloader_iter: Any) -> Tensor:
        batch, _, _ = next(dataloader_iter)
        return self.loss([batch[0].double(), batch[1]])


def test_all_callbacks_work_in_a_step_that_fetches_its_batches():
    class Plain(TwoTerms):
        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch)

    results = []
    for kind in (Fetches, Plain):
        torch.manual_seed(0)
        model = kind()
        callbacks = [
            VNERegularization("head:input", 0.3, queue_size=5),
            RepresentationMonitor("head", every_n_steps=1, metrics=["entropy", "rankme"], figures=False),
            StableRankRegularization("*", 0.1, rank=2),
            SpectrumMonitor("*", every_n_steps=1, figures=False),
        ]
        logged = log_of(
            model, *callbacks, batches=make_batches(3), validation=Batches(make_batches(2)), log_every_n_steps=1
        )
        results.append((logged, dict(model.state_dict())))
    torch.testing.assert_close(*results)
