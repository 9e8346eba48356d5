"""A model, and a compression of it within a few steps, that several test files share."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.callbacks import LowRankCompression, Penalty, SearchSettings, Timing
from tests.callbacks.nesting import gathered
from tests.models import Classifier, make_batches

BATCHES = make_batches(6)
RANKS = {"backbone.0": 2, "backbone.2": 1}


class Model(Classifier):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(lr=0.05, **arguments)
        self.example_input_array = BATCHES[0][0].float()

    def accuracy(self, batch: Any) -> tuple[Tensor, int]:
        return (self(batch[0]).argmax(1) == batch[1]).sum(), len(batch[1])

    def held_out(self) -> Any:
        return BATCHES[4:]


def seeded(kind: Any = Model, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return kind(**arguments)


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    return gathered(settings, {"search": SearchSettings, "penalty": Penalty, "timing": Timing})


def in_steps(search_at: float = 3, factorize_at: float | None = 9, **settings: Any) -> LowRankCompression:
    """Searches before step 3, and splits at the start of the third of epochs of six steps."""
    timing = {"unit": "steps", "search_at": search_at, "factorize_at": factorize_at}
    given = {"layers": "*", "budget": 0.7, "weight": 0.3, "data": BATCHES[:2], "figures": False, **timing, **settings}
    return LowRankCompression(**nested(given))


def assert_same(model: nn.Module, expected: nn.Module, **tolerance: float) -> None:
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), **tolerance)
