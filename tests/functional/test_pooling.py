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
    """Pools by their names, for one sample and one position at a time."""
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


VALID = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 0, 1, 0, 0]])
BY_HAND = {
    "mean": lambda tokens: tokens.mean(0, keepdim=True),
    "max": lambda tokens: tokens.amax(0, keepdim=True),
    "first": lambda tokens: tokens[:1],
    "last": lambda tokens: tokens[-1:],
    "tokens": lambda tokens: tokens,
}
FORMS = {
    "integers": lambda mask: mask,
    "bool": lambda mask: mask.bool(),
    "float": lambda mask: mask.float(),
    "added to scores": lambda mask: torch.where(mask.bool(), 0.0, torch.finfo(torch.float32).min)[:, None, None],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["NLC", "NCL", "LNC"])
@pytest.mark.parametrize("pool", BY_HAND)
def test_masked_pools(pool: str, layout: str, form: str):
    expected = torch.cat([BY_HAND[pool](tokens[valid]) for tokens, valid in zip(TOKENS, VALID.bool(), strict=True)])
    filled = torch.where(VALID.bool()[..., None], TOKENS, torch.nan)  # what stands in the padding never counts
    given = filled.permute(["NLC".index(letter) for letter in layout])
    torch.testing.assert_close(pool_embeddings(given, pool, layout=layout, mask=FORMS[form](VALID)), expected)


@pytest.mark.parametrize("pool", [*BY_HAND, "flatten"])
def test_masked_gradients(pool: str):
    given = TOKENS.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pool_embeddings(x, pool, layout="NLC", mask=VALID), given)
    (gradient,) = torch.autograd.grad(pool_embeddings(given, pool, layout="NLC", mask=VALID).sum(), given)
    assert not gradient[~VALID.bool()].any()


def test_lengths_and_samples():
    lengths = torch.tensor([2, 5, 1, 3])
    mask = torch.arange(5) < lengths[:, None]
    torch.testing.assert_close(
        pool_embeddings(TOKENS, layout="NLC", mask=lengths), pool_embeddings(TOKENS, layout="NLC", mask=mask)
    )
    some = torch.tensor([True, False, True, True])
    torch.testing.assert_close(pool_embeddings(MATRIX, mask=some), MATRIX[some])
    assert pool_embeddings(TOKENS, "tokens", layout="NLC", mask=some).shape == (15, 3)


def test_masked_maps():
    mask = torch.rand(4, 2, 6) < 0.5
    mask[:, 0, 0] = True
    expected = torch.stack([image[:, valid].mean(1) for image, valid in zip(IMAGE, mask, strict=True)])
    for layout, given in (("NCHW", IMAGE), ("NHWC", IMAGE.movedim(1, -1))):
        torch.testing.assert_close(pool_embeddings(given, layout=layout, mask=mask), expected)
        torch.testing.assert_close(pool_embeddings(given, layout=layout, mask=mask[:, None]), expected)


@pytest.mark.parametrize("pool", ["mean", "max", "first", "last"])
def test_a_sample_without_a_valid_position_is_a_row_of_zeros(pool: str):
    mask = VALID.clone()
    mask[1] = 0
    pooled = pool_embeddings(TOKENS.double().requires_grad_(), pool, layout="NLC", mask=mask)
    assert not pooled[1].any()
    assert pooled.isfinite().all()


def test_zeros_in_place_of_padding_keep_the_spectrum_of_flattened_sequences():
    mask = torch.arange(5) < torch.tensor([2, 3, 1, 2])[:, None]
    short = pool_embeddings(TOKENS[:, :3], "flatten", layout="NLC", mask=mask[:, :3])
    long = pool_embeddings(TOKENS, "flatten", layout="NLC", mask=mask)
    torch.testing.assert_close(long @ long.T, short @ short.T)


def test_half_precision_sums_do_not_overflow():
    tokens = torch.full((1, 300, 2), 1000.0).half()
    assert pool_embeddings(tokens, layout="NLC", mask=torch.ones(1, 300).bool()).isfinite().all()
