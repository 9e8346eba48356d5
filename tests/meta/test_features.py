"""Results of an inner loop besides a loss: curves over its steps, and features with their gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_plugins.meta import GAP, InnerLoop
from tests.meta.test_running_statistics import MODES, RATE, STEPS, batch, network


@pytest.mark.parametrize("mode", MODES)
def test_curve_is_what_calls_with_fewer_steps_give(mode):
    loop = InnerLoop(network().eval(), F.cross_entropy, GAP(), steps=STEPS, learning_rate=RATE, vectorize=MODES[mode])
    losses, outputs = loop.curve(batch(), batch(seed=1), steps=4)
    assert not losses.requires_grad
    for steps in range(5):
        episodes = loop(batch(), batch(seed=1), steps=steps)
        torch.testing.assert_close(losses[:, steps], episodes.losses)
        torch.testing.assert_close(outputs[:, steps], episodes.outputs)
    with torch.inference_mode():
        torch.testing.assert_close(loop.curve(batch(), batch(seed=1))[0], losses[:, : STEPS + 1])


@pytest.mark.parametrize("mode", ["vectorised", "looped"])
@pytest.mark.parametrize("layer", ["7:input", "4"])
def test_features_of_the_query_samples_carry_their_gradient(layer, mode):
    loop = InnerLoop(network(), F.cross_entropy, steps=STEPS, learning_rate=RATE, vectorize=MODES[mode])
    episodes, features = loop.with_features(batch(), batch(seed=1), layer)
    assert features.shape == (5, 6, 5)
    adapted = loop.adapt(batch())
    expected = []
    for task in range(5):
        current = {name: value[task] for name, value in adapted.items()}
        x = batch(seed=1)[0][task]
        for i in range(int(layer[0]) + (layer == "4")):
            parts = {name.split(".")[1]: value for name, value in current.items() if name.startswith(f"{i}.")}
            x = torch.func.functional_call(loop.model[i], parts, (x,))
        expected.append(x)
    torch.testing.assert_close(features, torch.stack(expected))
    found = torch.autograd.grad(features.square().sum(), loop.model[0].weight, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(torch.stack(expected).square().sum(), loop.model[0].weight))
    torch.testing.assert_close(episodes.loss, loop(batch(), batch(seed=1)).loss)


class Skips(nn.Sequential):
    def forward(self, x):
        return self[1](x)


def test_a_layer_that_is_not_called_is_named():
    model = Skips(nn.Tanh(), nn.Linear(2, 1))
    x, y = torch.ones(2, 3, 2), torch.ones(2, 3, 1)
    with pytest.raises(ValueError, match="`layer`: '0' was not called"):
        InnerLoop(model, F.mse_loss).with_features((x, y), (x, y), "0")


class Twice(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](self[0](x)))


def test_of_a_layer_that_is_called_twice_the_last_tensor_counts():
    model = Twice(nn.Linear(2, 2), nn.Linear(2, 1))
    x, y = torch.randn(2, 3, 2), torch.randn(2, 3, 1)
    loop = InnerLoop(model, F.mse_loss)
    _, features = loop.with_features((x, y), (x, y), "0")
    _, received = loop.with_features((x, y), (x, y), "1:input")
    torch.testing.assert_close(features, received)
