import pytest
import torch
from torch import nn

from lightning_plugins.weights import (
    matrix_to_weight,
    select_weight_matrices,
    weight_to_matrix,
)


@pytest.mark.parametrize("scheme", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shape", [(8, 4), (8, 4, 3), (8, 4, 3, 2), (8, 4, 3, 2, 1)], ids=str)
def test_folding_back_is_the_inverse(shape, groups, scheme):
    weight = torch.randn(shape)
    matrix = weight_to_matrix(weight, groups=groups, scheme=scheme)
    assert matrix.ndim == (2 if groups == 1 else 3)
    torch.testing.assert_close(matrix_to_weight(matrix, shape, groups=groups, scheme=scheme), weight, rtol=0, atol=0)


@pytest.mark.parametrize("scheme", [1, 2])
def test_a_rank_of_the_matrix_is_a_factorised_convolution(scheme):
    """The reason for each scheme: of rank r, the convolution is two convolutions with r channels between them."""
    high, wide = (3, 1) if scheme == 2 else (1, 1)
    first = torch.randn(2, 4, *((1, 3) if scheme == 2 else (3, 3)), dtype=torch.float64)
    second = torch.randn(8, 2, high, wide, dtype=torch.float64)
    picture = torch.randn(1, 4, 7, 7, dtype=torch.float64)
    expected = nn.functional.conv2d(nn.functional.conv2d(picture, first), second)
    if scheme == 1:
        whole = torch.einsum("or,rihw->oihw", second[..., 0, 0], first)
    else:
        whole = torch.einsum("orh,riw->oihw", second[..., 0], first[:, :, 0])
    torch.testing.assert_close(nn.functional.conv2d(picture, whole), expected)
    assert torch.linalg.matrix_rank(weight_to_matrix(whole, scheme=scheme)) == 2


def test_take_is_a_view_and_put_its_inverse():
    attention = nn.MultiheadAttention(6, 2)
    for weight in select_weight_matrices(nn.ModuleDict({"a": attention}), "*"):
        matrix = weight.take(weight.tensor)
        assert matrix.untyped_storage().data_ptr() == weight.tensor.untyped_storage().data_ptr()
        assert weight.shape == tuple(matrix.shape) == (6, 6)
        torch.testing.assert_close(weight.put(matrix), matrix)


def test_weights_shared_by_layers_are_there_once():
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = one.weight
    model = nn.ModuleDict({"one": one, "other": other, "again": one})
    assert [weight.label for weight in select_weight_matrices(model, "*")] == ["one"]


def test_computed_weights_are_taken_where_allowed():
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)})
    for layer in model.values():
        nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(ValueError, match="'weight' of 'a' must be a parameter"):
        select_weight_matrices(model, "?")
    assert [weight.label for weight in select_weight_matrices(model, "?", computed=True)] == ["a", "b"]
