"""The inner loop's batch norm against torch's own and against finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap

from lightning_plugins.meta.loop.batch_norm import batch_norm

SHAPES = [(6, 3), (4, 3, 5), (4, 2, 3, 2), (2, 2, 2, 2, 2), (1, 2, 3, 3)]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(shape, dtype=torch.float64):
    x, weight, bias = random(*shape, dtype=dtype), random(shape[1], seed=1, dtype=dtype), random(shape[1], seed=2)
    return (3 * x + 1).requires_grad_(), weight.requires_grad_(), bias.to(dtype).requires_grad_()


def native(x, weight, bias, eps):
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_derivatives_are_those_of_torch(shape):
    tensors, found = inputs(shape), []
    for function in (native, batch_norm):
        result = function(*tensors, 1e-3)
        first = torch.autograd.grad((result.pow(3) * random(*shape, seed=3)).sum(), tensors, create_graph=True)
        total = sum((each * random(*each.shape, seed=i)).sum() for i, each in enumerate(first))
        found.append((result, first, torch.autograd.grad(total, tensors)))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_derivatives_are_those_of_finite_differences(shape):
    assert gradcheck(lambda *tensors: batch_norm(*tensors, 1e-3), inputs(shape))
    assert gradgradcheck(lambda *tensors: batch_norm(*tensors, 1e-3), inputs(shape))


def test_each_part_of_the_first_derivative_has_its_own():
    tensors = inputs((4, 2, 3, 2))
    for part in range(3):
        found = []
        for function in (native, batch_norm):
            first = torch.autograd.grad(function(*tensors, 1e-3).pow(3).sum(), tensors, create_graph=True)[part]
            found.append(torch.autograd.grad(first.pow(2).sum(), tensors, allow_unused=part == 2))
        torch.testing.assert_close(found[1], found[0])


def test_without_weight_and_bias():
    x = inputs((4, 2, 3, 2))[0]
    torch.testing.assert_close(batch_norm(x, None, None, 1e-5), native(x, None, None, 1e-5))


@pytest.mark.parametrize("weights", [None, 0], ids=["shared weights", "weights of their own"])
def test_second_derivative_under_vmap_is_that_of_a_loop(weights):
    x, weight, bias = (torch.stack([tensor.detach()] * 3) for tensor in inputs((4, 2, 3, 2)))
    x = x * torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64).reshape(3, 1, 1, 1, 1)
    if weights is None:
        weight, bias = weight[0], bias[0]

    def inner(x, weight, bias):
        def total(x, weight, bias):
            return batch_norm(x, weight, bias, 1e-3).pow(3).sum()

        return sum(each.pow(2).sum() for each in grad(total, argnums=(0, 1, 2))(x, weight, bias))

    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    vmap(inner, in_dims=(0, weights, weights))(*leaves).sum().backward()
    found = [leaf.grad for leaf in leaves]
    others = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    sum(inner(others[0][i], *(t if weights is None else t[i] for t in others[1:])) for i in range(3)).backward()
    torch.testing.assert_close(found, [other.grad for other in others])


def test_in_float32_far_from_zero():
    x = (random(8, 4, 6, 6) + 100).requires_grad_()
    weight, bias = random(4, seed=1), random(4, seed=2)
    found = []
    for dtype in (torch.float64, torch.float32):
        first = torch.autograd.grad(
            batch_norm(x.to(dtype), weight.to(dtype), bias.to(dtype), 1e-5).pow(3).sum(), x, create_graph=True
        )[0]
        found.append((first, torch.autograd.grad(first.pow(2).sum(), x)[0]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-1)


def test_half_precision_is_computed_in_float32():
    x, weight, bias = inputs((4, 2, 3, 2), torch.bfloat16)
    expected = batch_norm(x.float(), weight.float(), bias.float(), 1e-5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(batch_norm(x, weight, bias, 1e-5), expected, rtol=0, atol=0)


def test_memory_format_does_not_matter():
    x, weight, bias = inputs((4, 2, 3, 2))
    turned = x.detach().contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(batch_norm(turned, weight, bias, 1e-5), batch_norm(x, weight, bias, 1e-5))
