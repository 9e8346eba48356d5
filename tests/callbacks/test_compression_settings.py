"""A compression under a budget in other precisions, compiled, and of networks with more kinds of layers."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_plugins.callbacks import MaskScheduling
from tests.callbacks.budgets import BATCHES, in_steps, params, seeded
from tests.compression.networks import NETWORKS
from tests.models import fit


@pytest.mark.parametrize("fused", [False, True])
def test_fp16_scaler(fused):
    """The scores' gradient is freed of the scale, which differs by thousands between the two."""

    def train(**settings: Any) -> tuple[Any, Any]:
        model, callback = seeded().float(), in_steps(MaskScheduling)
        model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=fused)
        fit(model, [(x.float(), y) for x, y in BATCHES], [callback], max_epochs=1, max_steps=6, **settings)
        return callback._state["network"]["masks"], callback._state["optimizer"]

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with pytest.warns(UserWarning, match="nothing was removed"):
        half, half_adam = train(plugins=MixedPrecision("16-mixed", "cpu", scaler), precision=None)
    with pytest.warns(UserWarning, match="nothing was removed"):
        whole, whole_adam = train(precision="32-true")
    assert scaler.get_scale() == 2.0**12  # no step was left out
    torch.testing.assert_close(half_adam["squares"], whole_adam["squares"], rtol=0.1, atol=1e-7)
    for name in ("scores.0", "scores.1"):
        torch.testing.assert_close(half[name], whole[name], rtol=0.05, atol=0.05)


class Network(LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        kind, shape = NETWORKS[name]
        self.net, self.example_input_array = kind(), torch.zeros(shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    model, callback = seeded(Network, name=name), in_steps(cost="flops", budget=0.5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, *NETWORKS[name][1], generator=generator, dtype=torch.float64)
    fit(model, [(part, torch.tensor([0, 1])) for part in x], [callback], max_epochs=3)
    counter = FlopCounterMode(display=False)
    with counter:
        model.eval()(model.example_input_array.double())
    after = callback.report.after
    assert (after.params, after.flops) == (params(model), counter.get_total_flops())
    assert counter.get_total_flops() <= 0.5 * callback.report.before.flops
