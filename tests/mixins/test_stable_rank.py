from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_plugins.functional.stable_rank import modified_stable_rank, stable_rank
from lightning_plugins.mixins.stable_rank import StableRankMixin
from tests.models import Classifier, fit, make_batches

BATCHES = make_batches(4)


class WithMixin(StableRankMixin, Classifier):
    arguments: Mapping[str, Any] = MappingProxyType({})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) + self.stable_rank_penalty(**{"layers": "*", "weight": 0.3, **self.arguments})


class ByHand(Classifier):
    term = staticmethod(stable_rank)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weights = (self.backbone[0].weight, self.backbone[2].weight, self.head.weight)
        return self.loss(batch) + 0.3 * sum(self.term(weight) for weight in weights)


def seeded(kind: Any) -> Any:
    torch.manual_seed(0)
    return kind()


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}], ids=str)
@pytest.mark.parametrize("rank", [None, 2])
def test_trains_as_written_by_hand(rank, settings):
    model, expected = seeded(WithMixin), seeded(ByHand)
    model.arguments = {"rank": rank, "p": 2}
    if rank:
        expected.term = lambda weight: modified_stable_rank(weight, rank, 2)
    fit(model, BATCHES, **settings)
    fit(expected, BATCHES, **settings)
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()))


def test_logs_where_asked():
    model = seeded(WithMixin)
    model.arguments = {"log": True, "layers": "head"}
    logged = fit(model, BATCHES, max_epochs=1).callback_metrics
    assert set(logged) == {"stable_rank/head", "stable_rank/penalty"}
    torch.testing.assert_close(logged["stable_rank/penalty"], 0.3 * logged["stable_rank/head"])


def test_reaches_computed_weights():
    model = seeded(WithMixin)
    nn.utils.parametrizations.weight_norm(model.head)
    penalty = model.stable_rank_penalty("head", 0.3, rank=1)
    penalty.backward()
    torch.testing.assert_close(penalty, 0.3 * modified_stable_rank(model.head.weight, 1))
    assert bool(model.head.parametrizations.weight.original1.grad.any())


def test_needs_a_module():
    with pytest.raises(TypeError, match="must be mixed into a LightningModule, got StableRankMixin"):
        StableRankMixin().stable_rank_penalty("*", 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "hed", "weight": 0.1}, "did you mean 'head'"),
        ({"layers": "head", "weight": float("nan")}, "`weight` must be finite"),
        ({"layers": "head", "weight": 0.1, "rank": 7}, "`rank` must be below"),
        ({"layers": "head", "weight": 0.1, "p": 3}, "`p` must be 1 or 2"),
        ({"layers": "head", "weight": 0.1, "scheme": 3}, "`scheme` must be 1 or 2"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        seeded(WithMixin).stable_rank_penalty(**arguments)
