from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_plugins.functional.pooling import POOLS, pool_embeddings

LAYOUTS = {3: "NLC", 4: "NCHW", 5: "NCDHW"}
MATRIX, TOKENS, IMAGE, VIDEO = (torch.randn(shape) for shape in [(4, 3), (4, 5, 3), (4, 3, 2, 6), (4, 3, 2, 2, 3)])


@pytest.mark.parametrize("pool", POOLS)
def test_a_matrix_stays_as_it_is(pool: str):
    assert pool_embeddings(MATRIX, pool) is MATRIX


def rows_one_by_one(features: Tensor, pool: str) -> Tensor:
    """What the names mean, for one sample and one position at a time."""
    rows = []
    for sample in features:
        if sample.ndim == 2:  # tokens: (L, d)
            positions = list(sample)
        else:  # a map: (d, H, W, ...)
            positions = [sample.flatten(1)[:, index] for index in range(sample[0].numel())]
        if pool == "tokens":
            rows += positions
        else:
            rows.append(sum(positions) / len(positions))
    return torch.stack(rows)


@pytest.mark.parametrize("pool", ["mean", "tokens"])
@pytest.mark.parametrize("features", [TOKENS, IMAGE, VIDEO], ids=["tokens", "image", "video"])
def test_mean_and_tokens(features: Tensor, pool: str):
    torch.testing.assert_close(
        pool_embeddings(features, pool, layout=LAYOUTS[features.ndim]), rows_one_by_one(features, pool)
    )


@pytest.mark.parametrize("features", [TOKENS, IMAGE, VIDEO], ids=["tokens", "image", "video"])
def test_flatten(features: Tensor):
    torch.testing.assert_close(pool_embeddings(features, "flatten"), torch.stack([one.reshape(-1) for one in features]))


def test_cls():
    torch.testing.assert_close(
        pool_embeddings(TOKENS, "cls", layout="NLC"), torch.stack([sample[0] for sample in TOKENS])
    )


@pytest.mark.parametrize("features", [IMAGE, VIDEO], ids=["image", "video"])
def test_cls_of_a_feature_map_is_refused(features: Tensor):
    with pytest.raises(
        ValueError, match=r"takes one token of a sequence, .*; use 'mean' or 'flatten' for feature maps"
    ):
        pool_embeddings(features, "cls", layout=LAYOUTS[features.ndim])


@pytest.mark.parametrize("features", [IMAGE, VIDEO], ids=["image", "video"])
def test_mean_with_channels_last(features: Tensor):
    pooled = pool_embeddings(features.movedim(1, -1), "mean_last")
    torch.testing.assert_close(pooled, pool_embeddings(features, "mean", layout=LAYOUTS[features.ndim]))


def test_mean_of_tokens_has_channels_last_anyway():
    torch.testing.assert_close(pool_embeddings(TOKENS, "mean_last"), pool_embeddings(TOKENS, "mean", layout="NLC"))


def test_a_callable_sees_the_whole_tensor():
    channels_last = IMAGE.movedim(1, -1)
    pooled = pool_embeddings(channels_last, lambda x: x.mean(dim=(1, 2)))
    torch.testing.assert_close(pooled, pool_embeddings(IMAGE, "mean", layout="NCHW"))


@pytest.mark.parametrize("pool", ["mean", "tokens", "flatten"])
def test_the_gradient_reaches_every_entry(pool: str):
    features = VIDEO.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pool_embeddings(x, pool, layout="NCDHW"), features)
    assert bool((torch.autograd.grad(pool_embeddings(features, pool, layout="NCDHW").sum(), features)[0] > 0).all())


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (torch.ones(4), ValueError, r"at least the two dimensions \(N, d\), got shape \(4,\); choose a layer"),
        (torch.tensor(1.0), ValueError, r"got shape \(\)"),
        (torch.ones(4, 3).int(), TypeError, "floating tensor, got torch.int32"),
        (torch.ones(4, 3, dtype=torch.bool), TypeError, "floating tensor, got torch.bool"),
        (torch.ones(4, 3, dtype=torch.complex64), TypeError, "floating tensor, got torch.complex64"),
        ([1.0], TypeError, "floating tensor, got list"),
    ],
    ids=["1-D", "0-D", "int", "bool", "complex", "list"],
)
def test_what_is_no_embedding_is_refused(pool: str, features: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        pool_embeddings(features, pool)


@pytest.mark.parametrize(
    ("pool", "error", "message"),
    [
        (lambda x: x.sum(), ValueError, r"`pool` must return a matrix of shape \(N, d\), got shape \(\)"),
        (lambda x: x, ValueError, r"`pool` must return a matrix of shape \(N, d\), got shape \(4, 5, 3\)"),
        (lambda x: x.argmax(1), TypeError, r"`pool` must return a floating tensor of shape \(N, d\), got torch.int64"),
        (lambda x: None, TypeError, r"`pool` must return a floating tensor of shape \(N, d\), got NoneType"),
    ],
    ids=["scalar", "3-D", "int", "None"],
)
def test_what_a_callable_must_return(pool: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        pool_embeddings(TOKENS, pool)
