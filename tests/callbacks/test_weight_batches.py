"""Weights of one shape in one batch: the same gradients, in any memory layout, with little copied."""

import math

import pytest
import torch
from torch import nn

from lightning_plugins.callbacks._terms import weight_batches
from lightning_plugins.callbacks._terms.weight_batches import (
    add_gradients,
    computed_in_batches,
    in_rounds,
    joined,
    of_each_weight,
)
from lightning_plugins.weights import select_weight_matrices


def layers():
    torch.manual_seed(0)
    found = {
        "wide": nn.Linear(20, 8),
        "also_wide": nn.Linear(20, 8),
        "tall": nn.Linear(8, 20),
        "convolution": nn.Conv2d(4, 8, 3),
        "channels_last": nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last),
        "tall_channels_last": nn.Conv2d(2, 40, 3).to(memory_format=torch.channels_last),
        "groups": nn.Conv2d(8, 8, 3, groups=2),
        "groups_channels_last": nn.Conv2d(8, 8, 3, groups=2).to(memory_format=torch.channels_last),
        "attention": nn.MultiheadAttention(8, 2),
        "computed": nn.utils.parametrizations.weight_norm(nn.Linear(20, 8)),
        "frozen": nn.Linear(20, 8),
    }
    for name, layer in found.items():
        for parameter in layer.parameters():
            if name != "frozen":
                parameter.grad = torch.ones_like(parameter)
    return nn.ModuleDict(found)


class Doubles:
    def scale(self, tensor):
        return 2 * tensor


def with_gradients_of_squares(model, factor=0.5, *, scheme=1, scaler=None, leave=()):
    """Add ``factor`` times the weights themselves, the gradient of half their squares, but to those that are left."""
    weights = select_weight_matrices(model, "*", scheme=scheme, computed=True)
    with torch.no_grad():
        for batches in in_rounds(weights, lambda weight: weight.rows is None):
            found = computed_in_batches(batches, lambda own: [(batch.matrices.clone(),) for batch in own], None)
            present = [weight.label for batch in batches for weight in batch.weights]
            wanted = torch.tensor([label not in leave for label in present])
            gradients = [gradient for (gradient,) in found]
            for batch, gradient in zip(batches, gradients, strict=True):
                for weight, part in zip(batch.weights, batch.each(gradient), strict=True):
                    if weight.label in leave:
                        part.fill_(math.nan)
            add_gradients(batches, gradients, factor, scaler, wanted=wanted)
    return model


@pytest.mark.parametrize("size", [2**26, 200, 1], ids=["one round", "several", "one weight a round"])
@pytest.mark.parametrize("scheme", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients_reach_the_weights_they_belong_to(dtype, scheme, size, monkeypatch):
    monkeypatch.setattr(weight_batches, "_ROUND", size)
    model = with_gradients_of_squares(layers().to(dtype), scheme=scheme)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    for name, layer in model.items():
        if name in {"computed", "frozen"}:
            continue
        weight = layer.in_proj_weight if name == "attention" else layer.weight
        torch.testing.assert_close(weight.grad, 1 + 0.5 * weight.detach(), **tolerance)
    assert model["frozen"].weight.grad is None
    parts = list(model["computed"].parametrizations.weight.parameters())
    expected = torch.autograd.grad(model["computed"].weight.float().square().sum() / 4, parts)
    for part, gradient in zip(parts, expected, strict=True):
        torch.testing.assert_close(part.grad, 1 + gradient, **tolerance)


def test_scaler_of_a_fused_optimizer():
    model = with_gradients_of_squares(layers(), scaler=Doubles())
    for name in ("wide", "tall", "channels_last", "groups_channels_last"):
        torch.testing.assert_close(model[name].weight.grad, 1 + model[name].weight.detach())


def test_those_that_are_not_finite_are_left_out():
    model = with_gradients_of_squares(layers(), leave=("wide", "groups", "channels_last"))
    for name in ("wide", "groups", "channels_last"):
        torch.testing.assert_close(model[name].weight.grad, torch.ones_like(model[name].weight), rtol=0, atol=0)
    torch.testing.assert_close(model["also_wide"].weight.grad, 1 + 0.5 * model["also_wide"].weight.detach())


def test_one_batch_for_a_shape_and_no_copy_for_a_single_weight():
    model = layers()
    (batches,) = in_rounds(select_weight_matrices(model, "*", computed=True), lambda weight: None)
    found = {tuple(weight.label for weight in batch.weights): batch for batch in batches}
    assert ("wide", "also_wide", "computed", "frozen") in found
    assert tuple(found["groups",].matrices.shape) == (2, 4, 36)
    for name, last in {
        "tall": False,
        "convolution": False,
        "channels_last": True,
        "groups_channels_last": True,
    }.items():
        batch = found[name,]
        assert batch.channels_last is last
        assert batch.matrices.data_ptr() == model[name].weight.data_ptr()
    assert not found["tall_channels_last",].channels_last  # its right singular vectors depend on the order


def test_gradients_in_the_layout_of_the_weights_are_added_at_once(monkeypatch):
    def refuse(weight, *_, **__):
        raise RuntimeError(weight.label)

    monkeypatch.setattr(weight_batches, "add_gradient", refuse)
    model = layers()
    for name in ("computed", "frozen", "tall_channels_last"):  # these have no gradient in the layout of the matrix
        del model[name]
    with_gradients_of_squares(model)
    model["channels_last"].weight.grad = torch.ones(8, 4, 3, 3)
    with pytest.raises(RuntimeError, match=r"^channels_last$"):
        with_gradients_of_squares(model)


def test_a_gradient_in_another_layout_than_its_weight():
    model = layers()
    model["channels_last"].weight.grad = torch.ones(8, 4, 3, 3)
    model["convolution"].weight.grad = torch.ones(8, 4, 3, 3).to(memory_format=torch.channels_last)
    with_gradients_of_squares(model)
    for name in ("channels_last", "convolution"):
        torch.testing.assert_close(model[name].weight.grad, 1 + 0.5 * model[name].weight.detach())


def test_numbers_of_groups_are_summed():
    model = layers()
    (batches,) = in_rounds(select_weight_matrices(model, "*", computed=True), lambda weight: None)
    squares = torch.cat([batch.matrices.square().sum((-2, -1)) for batch in batches])
    labels = [weight.label for batch in batches for weight in batch.weights]
    found = dict(zip(labels, of_each_weight(batches, squares).tolist(), strict=True))
    for name in ("groups", "wide", "computed", "tall"):
        assert found[name] == pytest.approx(float(model[name].weight.detach().square().sum()), rel=1e-5)


def test_parts_of_one_tensor_are_joined_without_a_copy():
    whole = torch.arange(24.0).view(4, 3, 2)
    assert joined(list(whole)).data_ptr() == whole.data_ptr()
    for parts in (
        list(whole)[1:],
        [part.clone() for part in whole],
        list(whole)[::-1],
        [whole[0], whole[2]],
        [whole[0]],
    ):
        torch.testing.assert_close(joined(parts), torch.stack(parts), rtol=0, atol=0)


@pytest.mark.parametrize("scheme", [1, 2])
def test_shape_of_a_weight_is_that_of_its_matrix(scheme):
    for weight in select_weight_matrices(layers(), "*", scheme=scheme, computed=True):
        assert weight.shape == tuple(weight.take(weight.tensor).shape)
