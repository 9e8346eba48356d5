"""Adding a gradient in parts, without a tensor of the weight's size, is adding the whole one."""

import math

import pytest
import torch
from torch import nn

from lightning_plugins.callbacks._terms import weight_gradients
from lightning_plugins.callbacks._terms.weight_gradients import add_gradient
from lightning_plugins.functional.stable_rank import exact_gradient, followed_term
from lightning_plugins.functional.subspace import top_singular_subspace
from lightning_plugins.weights import select_weight_matrices

LAYERS = {
    "wide": lambda: nn.Linear(20, 8),
    "tall": lambda: nn.Linear(8, 20),
    "convolution": lambda: nn.Conv2d(4, 8, 3),
    "groups": lambda: nn.Conv2d(8, 8, 3, groups=2),
    "another memory layout": lambda: nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last),
    "attention": lambda: nn.MultiheadAttention(8, 2),
}


class Doubles:
    def scale(self, tensor):
        return 2 * tensor


def added(layer, factor=0.5, *, scheme=1, scaler=None, wanted=True, rank=3):
    """Return the sum added to gradients of ones, with the parts and with the exact gradient, both as weights."""
    results = []
    for weight in select_weight_matrices(nn.ModuleDict({"a": layer}), "a", scheme=scheme):
        matrix = weight.take(weight.tensor.detach())
        parts = followed_term(matrix, rank, top_singular_subspace(matrix, rank + 1).start)[1:4]
        before = torch.ones_like(weight.tensor)
        weight.tensor.grad = before.clone()
        add_gradient(weight, parts, factor, scaler, wanted=torch.tensor(wanted))
        expected = before.clone()
        part = expected if weight.rows is None else expected[slice(*weight.rows)]
        part += factor * weight.put(exact_gradient(matrix, rank, 2).gradient)
        results.append((weight.tensor.grad, expected))
    return results


@pytest.mark.parametrize("scheme", [1, 2])
@pytest.mark.parametrize("kind", LAYERS)
def test_parts_add_up_to_the_gradient(kind, scheme):
    for grad, expected in added(LAYERS[kind](), scheme=scheme):
        torch.testing.assert_close(grad, expected)
        assert not torch.equal(expected, torch.ones_like(expected))


@pytest.mark.parametrize("kind", ["wide", "tall", "convolution", "groups", "attention"])
def test_nothing_of_the_size_of_the_weight_is_made_for_it(kind, monkeypatch):
    def refuse(*_):
        raise RuntimeError("the gradient was put together")

    monkeypatch.setattr(weight_gradients, "whole_gradient", refuse)
    assert added(LAYERS[kind]())
    with pytest.raises(RuntimeError, match="put together"):
        added(LAYERS["convolution"](), scheme=2)  # control: this layout has no view of the matrix


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_precisions(dtype):
    for grad, expected in added(nn.Linear(20, 8).to(dtype)):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad, expected, rtol=1e-2, atol=1e-2)


def test_scaler_of_a_fused_optimizer():
    for (grad, _), (_, expected) in zip(
        added(layer := nn.Linear(20, 8), scaler=Doubles()), added(layer, factor=1.0), strict=True
    ):
        torch.testing.assert_close(grad, expected)


def test_what_is_not_wanted_is_left_out():
    for grad, _ in added(nn.Linear(20, 8), wanted=False):
        torch.testing.assert_close(grad, torch.ones_like(grad), rtol=0, atol=0)


def test_a_weight_without_a_gradient_stays_without():
    (weight,) = select_weight_matrices(nn.ModuleDict({"a": nn.Linear(4, 3)}), "a")
    add_gradient(weight, [torch.ones(3, 4)], 1.0, None, wanted=torch.tensor(True))
    assert weight.tensor.grad is None


def test_on_a_device_that_is_not_waited_for_a_nan_is_left_out(monkeypatch):
    layer = nn.Linear(20, 8)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)  # the other branch, which looks at no value
    with torch.no_grad():
        layer.weight[0, 0] = math.nan
    (weight,) = select_weight_matrices(nn.ModuleDict({"a": layer}), "a")
    weight.tensor.grad = torch.ones(8, 20)
    parts = [torch.full(shape, math.nan) for shape in ((1, 1), (8, 3), (3, 20))]
    add_gradient(weight, parts, 1.0, None, wanted=torch.tensor(False))
    torch.testing.assert_close(weight.tensor.grad, torch.ones(8, 20), rtol=0, atol=0)
