"""A model, and compressions of it under a budget within a few steps, that several test files share."""

from typing import Any

import torch
from torch import nn

from lightning_plugins.callbacks import HybridCompression, Phase
from lightning_plugins.compression import ChoiceRates, Limits
from tests.callbacks.nesting import gathered
from tests.models import Classifier, make_batches

BATCHES = [(x.double(), y) for x, y in make_batches(6)]
BEGIN, END, STEPS = 3, 11, 18  # of epochs of six steps: the choice is made in the second and carried out at its end


class Model(Classifier):
    """Three layers with channels to remove; float64 from the start, since Lightning restores before it converts."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(lr=0.05, **arguments)
        self.backbone = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5))
        self.example_input_array = torch.zeros(2, 6)
        self.double()


def seeded(kind: Any = Model, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return kind(**arguments)


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    return gathered(settings, {"phase": Phase, "limits": Limits, "rates": ChoiceRates})


def in_steps(kind: Any = HybridCompression, **settings: Any) -> Any:
    """Begins before step 3, chooses before step 11, and carries it out at the start of the third epoch."""
    rates = {} if kind.__name__ == "MaskScheduling" else {"thresholds": 0.03}
    rates |= {} if kind.__name__ == "RankScheduling" else {"scores": 0.2}
    phase = {"unit": "steps", "begin": BEGIN, "end": END}
    given = {"layers": "*", "budget": 0.5, "cost": "params", "figures": False, **phase, **rates, **settings}
    return kind(**nested(given))


def params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
