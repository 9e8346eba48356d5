import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_plugins.compression import dense_weight, low_rank_layer, truncated
from lightning_plugins.compression.low_rank.decomposition import decompose
from lightning_plugins.compression.low_rank.layers import full_rank, matrix_shape

F64 = torch.float64


def numpy_matrix(weight: torch.Tensor, scheme: int) -> np.ndarray:
    """The kernel's matrix, entry by entry."""
    w = weight.detach().double().numpy()
    if scheme == 1 or w.ndim < 4:
        return w.reshape(len(w), -1)
    outputs, inputs, high, wide = w.shape
    matrix = np.empty((outputs * high, inputs * wide))
    for o, i, y, x in itertools.product(*map(range, w.shape)):
        matrix[o * high + y, i * wide + x] = w[o, i, y, x]
    return matrix


def rebuilt(pair: nn.Sequential, scheme: int) -> np.ndarray:
    """The matrix of a pair, as the product of two written out."""
    first, second = (part.weight.detach().double().numpy() for part in pair)
    rank = len(first)
    if scheme == 1 or first.ndim < 4:
        return second.reshape(-1, rank) @ first.reshape(rank, -1)
    return np.moveaxis(second[..., 0], 1, 2).reshape(-1, rank) @ first.reshape(rank, -1)


def best_of_rank(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Another way to the best approximation: projection on the leading eigenvectors of the Gram matrix."""
    vectors = np.linalg.eigh(matrix @ matrix.T)[1][:, ::-1][:, :rank]
    return vectors @ vectors.T @ matrix


LAYERS = {
    "linear": lambda: nn.Linear(7, 5),
    "linear, tall, no bias": lambda: nn.Linear(4, 9, bias=False),
    "conv1d": lambda: nn.Conv1d(3, 5, 4),
    "conv2d": lambda: nn.Conv2d(3, 6, 3),
    "conv2d, oblong": lambda: nn.Conv2d(2, 5, (4, 2)),
    "conv2d, one row": lambda: nn.Conv2d(3, 4, (1, 3)),
    "conv2d, one column": lambda: nn.Conv2d(3, 4, (3, 1)),
    "conv2d, one by one": lambda: nn.Conv2d(6, 4, 1, bias=False),
}
CASES = [(name, scheme) for name in LAYERS for scheme in (1, 2) if not (name == "conv1d" and scheme == 2)]


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_pair_is_best_approximation_of_its_rank(name, scheme, rank):
    layer = LAYERS[name]().double()
    rank = min(rank, full_rank(layer, scheme=scheme))
    matrix = numpy_matrix(layer.weight, scheme)
    pair = low_rank_layer(layer, rank, scheme=scheme)
    expected = best_of_rank(matrix, rank)
    np.testing.assert_allclose(rebuilt(pair, scheme), expected, atol=1e-10)
    tail = np.linalg.svd(matrix, compute_uv=False)[rank:]
    error = np.linalg.norm(rebuilt(pair, scheme) - matrix)
    assert error == pytest.approx(math.sqrt(np.sum(tail**2)), abs=1e-10)
    assert matrix.shape == matrix_shape(layer, scheme=scheme)


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_factors_are_balanced(name, scheme):
    layer = LAYERS[name]().double()
    rank = full_rank(layer, scheme=scheme)
    first, second = low_rank_layer(layer, rank, scheme=scheme)
    A = first.weight.detach().reshape(rank, -1)
    B = second.weight.detach().transpose(0, 1).reshape(rank, -1)
    S = torch.from_numpy(np.linalg.svd(numpy_matrix(layer.weight, scheme), compute_uv=False).copy())
    torch.testing.assert_close(A @ A.T, torch.diag(S), rtol=0, atol=1e-10)
    torch.testing.assert_close(B @ B.T, torch.diag(S), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_dense_weight_and_truncated_agree_with_the_pair(name, scheme):
    layer = LAYERS[name]().double()
    for rank in (1, full_rank(layer, scheme=scheme)):
        pair = low_rank_layer(layer, rank, scheme=scheme)
        weight = truncated(layer, rank, scheme)
        assert weight.is_contiguous()
        torch.testing.assert_close(dense_weight(*pair), weight, rtol=0, atol=1e-12)
        merged = copy.deepcopy(layer)
        merged.weight.data = weight
        x = torch.randn(2, *layer.weight.shape[1:2], *(9 for _ in layer.weight.shape[2:]), dtype=F64)
        torch.testing.assert_close(pair(x), merged(x), rtol=0, atol=1e-10)


def test_dense_weight_carries_gradients():
    pair = low_rank_layer(nn.Conv2d(3, 4, 3), 2, scheme=2)
    dense_weight(*pair).square().sum().backward()
    assert all(bool(part.weight.grad.any()) for part in pair)


PADDINGS = [0, 1, (2, 1), (1, 2), "same", "valid"]


@pytest.mark.parametrize("scheme", [1, 2])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", PADDINGS, ids=str)
def test_full_rank_conv2d_computes_the_same(padding, mode, scheme):
    for kernel, stride, dilation in itertools.product([(3, 3), (1, 3), (3, 1), (2, 4)], [1, (2, 3)], [1, (2, 1)]):
        if padding == "same" and stride != 1:
            continue  # torch has none
        layer = nn.Conv2d(3, 5, kernel, stride, padding, dilation, padding_mode=mode).double()
        x = torch.randn(2, 3, 11, 10, dtype=F64)
        pair = low_rank_layer(layer, full_rank(layer, scheme=scheme), scheme=scheme)
        torch.testing.assert_close(pair(x), layer(x), rtol=0, atol=1e-10)
        torch.testing.assert_close(pair.float()(x.float()), layer.float()(x.float()), rtol=0, atol=1e-5)


@given(data=st.data())
@settings(max_examples=60)
def test_full_rank_computes_the_same_whatever_the_settings(data):
    draw = data.draw
    two = draw(st.booleans())
    size = st.tuples(*(st.integers(1, 3) for _ in range(1 + two)))
    kernel, stride, dilation = draw(size), draw(size), draw(size)
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.tuples(*(st.integers(0, 2) for _ in kernel))))
    if padding == "same":
        stride = tuple(1 for _ in kernel)
    kind = nn.Conv2d if two else nn.Conv1d
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    channels = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    bias = draw(st.booleans())
    layer = kind(*channels, kernel, stride, padding, dilation, bias=bias, padding_mode=mode).double()
    scheme = draw(st.sampled_from([1, 2])) if two else 1
    x = torch.randn(2, channels[0], *(draw(st.integers(8, 10)) for _ in kernel), dtype=F64)
    pair = low_rank_layer(layer, full_rank(layer, scheme=scheme), scheme=scheme)
    torch.testing.assert_close(pair(x), layer(x), rtol=0, atol=1e-10)
    assert [type(part) for part in pair] == [kind, kind]


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**31))
@settings(max_examples=30)
def test_error_of_the_output_never_grows_with_the_rank(outputs, inputs, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs).double()
    errors = [
        float((truncated(layer, rank) - layer.weight.detach()).norm()) for rank in range(1, min(outputs, inputs) + 1)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_pair_keeps_dtype_mode_and_what_is_trained(dtype):
    layer = nn.Conv2d(4, 6, 3).to(dtype).eval()
    layer.weight.requires_grad_(False)
    pair = low_rank_layer(layer, 4)
    assert type(pair) is nn.Sequential
    assert [type(part) for part in pair] == [nn.Conv2d, nn.Conv2d]
    assert {p.dtype for p in pair.parameters()} == {dtype}
    assert not any(module.training for module in pair.modules())
    assert {n: p.requires_grad for n, p in pair.named_parameters()} == {
        "0.weight": False,
        "1.weight": False,
        "1.bias": True,
    }
    assert all(p.is_contiguous() and p.data_ptr() != layer.weight.data_ptr() for p in pair.parameters())
    torch.testing.assert_close(pair[1].bias, layer.bias, rtol=0, atol=0)


def test_half_precision_is_cast_up_for_the_decomposition():
    layer = nn.Linear(12, 10).to(torch.bfloat16)
    exact = truncated(copy.deepcopy(layer).double(), 3)
    torch.testing.assert_close(truncated(layer, 3), exact.to(torch.bfloat16), rtol=1e-2, atol=1e-3)
    assert decompose(layer.weight)[1].dtype == torch.float32


def test_autocast_does_not_reach_the_decomposition():
    layer = nn.Linear(12, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, product = truncated(layer, 3), dense_weight(*low_rank_layer(layer, 3))
    torch.testing.assert_close(inside, truncated(layer, 3), rtol=0, atol=0)
    torch.testing.assert_close(product, inside)


def test_no_random_numbers_are_drawn():
    layer = nn.Linear(6, 5)
    before = torch.get_rng_state()
    low_rank_layer(layer, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_degenerate_weights_give_finite_factors():
    for weight in (torch.zeros(5, 6), torch.ones(5, 6), torch.eye(5, 6), 1e-30 * torch.randn(5, 6)):
        layer = nn.Linear(6, 5)
        layer.weight.data = weight
        pair = low_rank_layer(layer, 5)
        torch.testing.assert_close(dense_weight(*pair), weight, rtol=1e-5, atol=1e-6)


def test_decomposition_that_fails_in_float32_is_repeated_in_float64(monkeypatch):
    svd, calls = torch.linalg.svd, []

    def failing(matrix, **settings):
        calls.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return svd(matrix, **settings)

    monkeypatch.setattr(torch.linalg, "svd", failing)
    weight = torch.randn(4, 3)
    U, S, Vh = decompose(weight)
    assert calls == [torch.float32, F64]
    assert U.dtype == torch.float32
    torch.testing.assert_close(U * S @ Vh, weight)


@pytest.mark.parametrize("scheme", [1, 2])
def test_gradients_flow_to_both_halves_and_the_input(scheme):
    pair = low_rank_layer(nn.Conv2d(3, 4, 3).double(), 2, scheme=scheme)
    x = torch.randn(1, 3, 5, 5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(pair, x)
    pair(x).square().sum().backward()
    assert all(bool(p.grad.any()) for p in pair.parameters())


def test_pair_survives_copying_and_pickling():
    pair = low_rank_layer(nn.Conv2d(3, 4, 3), 2)
    x = torch.randn(2, 3, 6, 6)
    for other in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        torch.testing.assert_close(other(x), pair(x), rtol=0, atol=0)


BAD = [
    (lambda: low_rank_layer(nn.Conv2d(4, 4, 3, groups=2), 1), ValueError, "2 groups.*leave it dense"),
    (lambda: low_rank_layer(nn.Embedding(4, 4), 1), TypeError, "`layer` must be a Linear.*Embedding"),
    (lambda: low_rank_layer(nn.Conv3d(4, 4, 3), 1), TypeError, "Conv3d"),
    (lambda: low_rank_layer(nn.ConvTranspose2d(4, 4, 3), 1), TypeError, "ConvTranspose2d"),
    (lambda: low_rank_layer(nn.Sequential(), 1), TypeError, "Sequential.*name a layer in it"),
    (lambda: low_rank_layer(nn.LazyLinear(4), 1), ValueError, "lazy.*run a batch"),
    (lambda: low_rank_layer(nn.Linear(4, 3), 4), ValueError, "`rank` must be from 1 to 3, the full rank, got 4"),
    (lambda: low_rank_layer(nn.Linear(4, 3), 0), ValueError, "`rank` must be at least 1, got 0"),
    (lambda: low_rank_layer(nn.Linear(4, 3), 2.0), TypeError, "`rank` must be an int.*did you mean 2"),
    (lambda: low_rank_layer(nn.Linear(4, 3), True), TypeError, "`rank` must be an int"),
    (lambda: low_rank_layer(nn.Conv2d(4, 3, 3), 1, scheme=3), ValueError, "`scheme` must be 1 or 2, got 3"),
    (lambda: low_rank_layer(nn.Conv1d(4, 3, 3), 1, scheme=2), ValueError, "`scheme=2` needs two dimensions"),
    (lambda: low_rank_layer(nn.Linear(4, 3, device="meta"), 1), ValueError, "meta device"),
    (lambda: dense_weight(nn.Linear(4, 2), nn.Linear(3, 4)), ValueError, "`first` and `second` must have weights"),
    (lambda: dense_weight(nn.Conv2d(4, 2, 3), nn.Conv2d(2, 4, 3)), ValueError, "kernel of size 1"),
    (lambda: dense_weight(nn.ReLU(), nn.ReLU()), ValueError, "`first` and `second`"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value):
    layer = nn.Linear(4, 3)
    layer.weight.data[1, 2] = value
    with pytest.raises(ValueError, match="finite weight"):
        low_rank_layer(layer, 2)
    with pytest.raises(ValueError, match="finite weight"):
        truncated(layer, 2)
