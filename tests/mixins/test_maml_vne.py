"""The entropy of representations as a term of the outer loss, by the mixin and by the callback."""

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

from lightning_plugins.callbacks import RepresentationMonitor, VNERegularization
from lightning_plugins.mixins import VNEMixin
from tests.mixins.few_shot import ByHand, FewGAP, as_double, assert_learned_alike, make_tasks, weights
from tests.models import Batches, entropy_by_autograd, fit

BATCHES = make_tasks()


class WithTerm(VNEMixin, FewGAP):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        episodes, features = self.adapt_and_measure_features(batch)
        return episodes.loss + self.vne_penalty(features, weight=0.3, name="query_features")


class ByHandWithTerm(ByHand):
    """Keeps what stands before the last layer in the query pass of every task."""

    def run(self, w: Any, x: Tensor) -> Tensor:
        hidden = torch.tanh(torch.tanh(x @ w[0].T + w[1]) @ w[2].T + w[3])
        self.hidden = hidden
        return hidden @ w[4].T + w[5]

    def task(self, *parts: Any) -> Tensor:
        loss = super().task(*parts)
        self.kept.append(self.hidden)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.kept: list[Tensor] = []
        loss = super().training_step(batch, batch_idx)
        return loss - 0.3 * entropy_by_autograd(torch.cat(self.kept))


@pytest.fixture(scope="module")
def expected() -> ByHandWithTerm:
    model = ByHandWithTerm()
    fit(model, BATCHES)
    return model


def test_mixin_trains_as_written_by_hand(expected: ByHandWithTerm):
    model = WithTerm(features="3")
    trainer = fit(model, BATCHES)
    assert_learned_alike(model, expected)
    assert {"vne/query_features/entropy", "vne/penalty"} <= set(trainer.callback_metrics)


@pytest.mark.parametrize("features", ["3", "4:input"])
@pytest.mark.parametrize("vectorize", [True, False])
def test_callback_trains_as_written_by_hand(expected: ByHandWithTerm, vectorize: bool, features: str):
    model, plain = FewGAP(features=features, inner={"vectorize": vectorize}), FewGAP()
    trainer = fit(model, BATCHES, [VNERegularization("query_features", weight=0.3)])
    assert_learned_alike(model, expected)
    assert {"vne/query_features/entropy", "vne/penalty"} <= set(trainer.callback_metrics)
    fit(plain, BATCHES)
    assert not torch.equal(plain.gains()["2"], model.gains()["2"])  # control: the term reaches the gains


def test_gradient_of_loss_and_term_is_that_of_finite_differences():
    """Second-order terms flow through the features, to weights and gains."""
    model = WithTerm(features="3").double()
    model.inner_loop.preconditioner.derivative = "exact"
    for i, parameter in enumerate(model.inner_loop.preconditioner.parameters()):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)).double()
    (batch,) = as_double(make_tasks(1, 2))

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return self.model.training_step(batch, 0)

    step = Step()
    names, values = zip(*step.named_parameters(), strict=True)
    assert gradcheck(lambda *new: functional_call(step, dict(zip(names, new, strict=True)), ()), values)


def test_monitor_sees_the_features_in_validation():
    model = FewGAP(features="3")
    trainer = fit(model, BATCHES, [RepresentationMonitor("query_features")], validation=Batches(BATCHES[:2]))
    assert any(name.startswith("representation/val/query_features/") for name in trainer.callback_metrics)


@pytest.mark.parametrize("callback", [lambda at: VNERegularization(at, weight=0.1), RepresentationMonitor])
@pytest.mark.parametrize("layer", ["inner_loop.model.1", "inner_loop.model.4:input"])
def test_a_layer_of_the_network_is_refused(layer: str, callback: Any):
    name = layer.split(".")[2].partition(":")[0]
    with pytest.raises(MisconfigurationException, match=f"`features='{name}'`.*`layers='query_features'`"):
        fit(FewGAP(), BATCHES, [callback(layer)], validation=Batches(BATCHES[:2]))


def test_features_change_neither_loss_nor_checkpoint():
    model, plain = FewGAP(features="3"), FewGAP()
    assert list(model.state_dict()) == list(plain.state_dict())
    fit(model, BATCHES)
    fit(plain, BATCHES)
    torch.testing.assert_close(weights(model), weights(plain))
