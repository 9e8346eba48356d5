from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_plugins.callbacks import VNERegularization
from lightning_plugins.mixins import VNEMixin
from tests._processes import run_on_ranks
from tests.contract_ranks import BOUNDS, act_as_rank
from tests.models import Classifier, entropy_by_autograd, fit, make_batches, shard

BATCHES = make_batches(4)


def seeded(kind: type[LightningModule], **arguments: Any) -> Any:
    torch.manual_seed(0)
    return kind(**arguments)


class Automatic(VNEMixin, Classifier):
    name: str | None = "backbone"

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        penalty = self.vne_penalty(self.backbone(batch[0]), weight=0.3, name=self.name)
        return self.loss(batch) * self.trainer.world_size + penalty


class Manual(VNEMixin, Classifier):
    """Two optimizers that take turns in every step, as in adversarial training."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def term(self, features: Tensor) -> Tensor:
        return self.vne_penalty(features, weight=-0.2)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.zero_grad()
            self.manual_backward(self.loss(batch) * self.trainer.world_size + self.term(self.backbone(batch[0])))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.backbone, self.head)]


class ManualByHand(Manual):
    def term(self, features: Tensor) -> Tensor:
        return 0.2 * entropy_by_autograd(features)


def assert_same_weights(model: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()))


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}], ids=str)
def test_trains_and_logs_like_the_callback(settings: dict[str, Any]):
    model, expected = seeded(Automatic), seeded(Classifier)
    with_mixin = fit(model, BATCHES, **settings)
    with_callback = fit(expected, BATCHES, [VNERegularization("backbone", weight=0.3)], **settings)
    assert_same_weights(model, expected)
    assert set(with_mixin.callback_metrics) == {"vne/backbone/entropy", "vne/penalty"}
    torch.testing.assert_close(with_mixin.callback_metrics, with_callback.callback_metrics)


def test_nothing_is_logged_without_a_name():
    model = seeded(Automatic)
    model.name = None
    assert not fit(model, BATCHES).callback_metrics


def test_manual_optimization():
    model, expected = seeded(Manual), seeded(ManualByHand)
    fit(model, BATCHES)
    fit(expected, BATCHES)
    assert_same_weights(model, expected)


def test_adds_nothing_to_the_module():
    assert list(seeded(Automatic).state_dict()) == list(seeded(Classifier).state_dict())
    assert set(vars(seeded(Automatic))) == set(vars(seeded(Classifier)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_features_give_a_float32_penalty(dtype: torch.dtype):
    features = torch.randn(8, 5).to(dtype).requires_grad_()
    penalty = Automatic().vne_penalty(features, weight=0.3)
    penalty.backward()
    assert penalty.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert features.grad is not None
    assert features.grad.dtype == dtype
    torch.testing.assert_close(penalty, -0.3 * entropy_by_autograd(features.detach().to(penalty.dtype)))


def by_hand(features: Tensor) -> Tensor:
    return features.flatten(0, 1)


@pytest.mark.parametrize("pool", ["tokens", f"{__name__}.by_hand", lambda x: x.flatten(0, 1)])
def test_pools_like_the_callback(pool: Any):
    features = torch.randn(4, 3, 5, dtype=torch.float64)
    penalty = Automatic().vne_penalty(features, weight=1.0, pool=pool, layout="NLC")
    torch.testing.assert_close(penalty, -entropy_by_autograd(features.flatten(0, 1)))


class NoLightning(VNEMixin, nn.Module):
    pass


def test_works_in_any_module():
    penalty = NoLightning().vne_penalty(torch.eye(4), weight=1.0, name="features")
    torch.testing.assert_close(penalty, -torch.tensor(4.0).log())


def train(rank: int) -> list[dict[str, Tensor]]:
    act_as_rank(rank, 2)
    models = [seeded(Automatic), seeded(Manual)]
    for model in models:
        fit(model, shard(BATCHES, BOUNDS[2]), strategy="ddp", devices=2)
    return [dict(model.state_dict()) for model in models]


@pytest.mark.distributed
def test_unequal_ranks_equal_one_process(tmp_path: Any):
    ranks = run_on_ranks(train, 2, tmp_path)
    expected = [seeded(Automatic), seeded(ManualByHand)]
    for model in expected:
        fit(model, BATCHES)
    for rank in ranks:
        torch.testing.assert_close(rank, [dict(model.state_dict()) for model in expected], rtol=1e-6, atol=1e-6)
