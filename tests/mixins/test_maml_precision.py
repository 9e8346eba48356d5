"""Half precision and `torch.compile`: what an inner loop makes of them in a LightningModule."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision

from lightning_plugins.meta import Vectorization
from tests.mixins.few_shot import ByHand, Few, FewGAP, assert_learned_alike, make_tasks, weights
from tests.models import Batches, fit

BATCHES = make_tasks()


@pytest.mark.parametrize("inner", [{}, {"vectorize": Vectorization(chunk_size=2)}], ids=str)
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_half_precision(precision: str, inner: dict[str, Any]):
    """Under float16 the inner loop computes in float32, so the result is that of float32."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12) if precision == "16-mixed" else None
    model, expected = FewGAP(inner=inner), ByHand()
    fit(model, BATCHES, plugins=MixedPrecision(precision, "cpu", scaler), precision=None)
    fit(expected, BATCHES, precision="32-true")
    if scaler is None:
        assert_learned_alike(model, expected, rtol=0.05, atol=0.05)
    else:
        assert_learned_alike(model, expected, rtol=1e-4, atol=1e-5)
        assert scaler.get_scale() == 2.0**12  # no step was left out


def test_small_inner_gradients_survive_float16():
    """Times 1e-4 the support loss's gradient has entries below what float16 holds."""
    model = Few(inner={"learning_rate": 1e7, "steps": 1})
    model.inner_loop.loss = lambda outputs, targets: 1e-8 * F.mse_loss(outputs, targets)
    (batch,) = make_tasks(1)
    with torch.autocast("cpu", torch.float16):
        found = model.adapt_and_measure(batch).loss
    torch.testing.assert_close(found, model.adapt_and_measure(batch).loss)
    assert found < 0.99e-8 * 1e8 * model.inner_loop(*batch, steps=0).loss


# With torch 2.10 a compiled network cannot be vectorised.
@pytest.mark.filterwarnings("ignore:.*computed one after the other")
@pytest.mark.parametrize("part", ["step", "network"])
def test_a_compiled_part(part: str):
    """Compiled objects that are no LightningModule: the step on its own, and a network compiled before."""
    (batch,) = make_tasks(1)
    model, expected = FewGAP(inner={"steps": 1}), FewGAP(inner={"steps": 1})
    step = model.training_step
    if part == "step":
        step = torch.compile(step, backend="eager")
    else:
        model.network.compile(backend="eager")
    step(batch, 0).backward()
    expected.training_step(batch, 0).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in expected.parameters()])


def test_compiled():
    model, expected = (FewGAP(inner={"steps": 1, "evaluation_steps": 1}) for _ in range(2))
    fit(torch.compile(model, backend="eager"), BATCHES, validation=Batches(BATCHES[:1]))
    fit(expected, BATCHES, validation=Batches(BATCHES[:1]))
    torch.testing.assert_close(weights(model), weights(expected))
