"""A network that lost channels is compressed further by the next fit."""

import pytest
import torch
from torch import Tensor, nn

from lightning_plugins.callbacks import HybridCompression, MaskScheduling
from tests.callbacks.budgets import params
from tests.models import Classifier, fit, make_batches

BATCHES = make_batches(6)
PHASES = {"begin": 1, "end": 2, "unit": "epochs", "figures": False}


class Inside(Classifier):
    """All layers lie in one Sequential, and get Sequentials in their places."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
        self.backbone, self.head = nn.Identity(), nn.Identity()
        self.example_input_array = torch.zeros(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def compressed(callback) -> Inside:
    torch.manual_seed(0)
    model = Inside()
    fit(model, BATCHES, [callback], max_epochs=3)
    return model


@pytest.mark.parametrize("layers", ["*", "net.*"])
@pytest.mark.parametrize("kind", [HybridCompression, MaskScheduling])
def test_a_second_and_a_third_fit_go_on(kind, layers):
    model = compressed(kind(layers, budget=0.6, **PHASES))
    sizes = [params(model)]
    for budget in (0.6, 0.7):
        callback = kind(layers, budget=budget, **PHASES)
        fit(model, BATCHES, [callback], max_epochs=3)
        assert params(model) < sizes[-1]
        assert callback.report.share <= budget  # of the operations that the network had before this fit
        sizes.append(params(model))
