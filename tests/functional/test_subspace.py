import math

import pytest
import torch

from lightning_plugins.functional import subspace
from lightning_plugins.functional.subspace import top_singular_subspace


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def projector(basis):
    return basis @ basis.mT


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (4, 4), (1, 3), (2, 5, 9)], ids=str)
def test_exact_subspace_is_that_of_the_svd(shape):
    weight = random(*shape)
    rank = min(3, *shape[-2:])
    u, s, v = torch.linalg.svd(weight)
    vectors = u if shape[-2] <= shape[-1] else v.mT
    found = top_singular_subspace(weight, rank)
    torch.testing.assert_close(found.rows, found.basis.mT @ (weight if shape[-2] <= shape[-1] else weight.mT))
    torch.testing.assert_close(found.values, s[..., :rank])
    torch.testing.assert_close(projector(found.basis), projector(vectors[..., :rank]))


@pytest.mark.parametrize("shape", [(20, 60), (60, 20), (3, 20, 40)], ids=str)
def test_following_converges_to_the_exact_one(shape):
    weight = random(*shape)
    exact = top_singular_subspace(weight, 4)
    start = torch.linalg.qr(random(*shape[:-2], 20, 8, seed=1))[0]
    errors = []
    for _ in range(60):
        found = top_singular_subspace(weight, 8, start=start)
        start = found.start
        torch.testing.assert_close(found.rows.square().sum(-1).sqrt(), found.values)
        errors.append(torch.linalg.matrix_norm(projector(found.basis[..., :4]) - projector(exact.basis)).max().item())
        assert bool((found.values[..., :4] <= exact.values + 1e-12).all())
    assert errors[-1] < 1e-3 < errors[0]
    torch.testing.assert_close(found.values[..., :4], exact.values, rtol=1e-6, atol=0)
    torch.testing.assert_close(start.mT @ start, torch.eye(8, dtype=start.dtype).expand(*shape[:-2], 8, 8))


def test_what_grows_back_from_zero_is_found():
    """The start that follows a rank-deficient weight is completed to an orthonormal set."""
    weight = torch.diag(torch.tensor([3.0, 2.0, 0.0, 0.0]))
    start = top_singular_subspace(weight, 3).start
    start = top_singular_subspace(weight, 3, start=start).start
    weight[3, 3] = 5.0
    weight[2, 3] = 0.1
    for _ in range(10):
        found = top_singular_subspace(weight, 3, start=start)
        start = found.start
    torch.testing.assert_close(found.values, torch.linalg.svdvals(weight)[:3])


@pytest.mark.parametrize("followed", [True, False])
def test_nonfinite_weight_gives_nan_values_and_finite_vectors(followed):
    weight = random(4, 6)
    start = top_singular_subspace(weight, 2).start if followed else None
    weight[0, 0] = math.nan
    found = top_singular_subspace(weight, 2, start=start)
    assert bool(found.values.isnan().all())
    assert bool(found.start.isfinite().all())


def test_bfloat16_weight_is_cast_up_and_carries_no_gradient():
    found = top_singular_subspace(random(4, 6, dtype=torch.float32).bfloat16().requires_grad_(), 2)
    assert {part.dtype for part in found} == {torch.float32}
    assert not any(part.requires_grad for part in found)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: top_singular_subspace(torch.ones(3), 1), ValueError, "`weight` must have shape"),
        (lambda: top_singular_subspace(torch.ones(3, 4), 4), ValueError, "`rank` must be at most the smaller side, 3"),
        (lambda: top_singular_subspace(torch.ones(3, 4), 0), ValueError, "`rank` must be at least 1"),
        (
            lambda: top_singular_subspace(torch.ones(3, 4), 2, start=torch.ones(4, 2)),
            ValueError,
            r"`start` must have shape \(3, 2\).*got \(4, 2\)",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_following_without_a_decomposition_gives_the_same(monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(2, 24, 40, dtype=torch.float64) * 1e-4
    start = top_singular_subspace(weight, 6).start
    for _ in range(5):
        weight = weight + 1e-7 * torch.randn_like(weight)
        exact = top_singular_subspace(weight, 6, start=start, leading=2)
        with monkeypatch.context() as patch:
            patch.setattr(subspace, "_decomposition_waits", lambda matrix: True)
            patch.setattr(subspace, "decompose", None)  # must not be called
            found = top_singular_subspace(weight, 6, start=start, leading=2)
        torch.testing.assert_close(found.values, exact.values, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.basis @ found.basis.mT, exact.basis @ exact.basis.mT, rtol=0, atol=1e-3)
        start = found.start
    torch.testing.assert_close(found.values, torch.linalg.svdvals(weight)[:, :2], rtol=1e-6, atol=0)
