"""The norms that stand in for torch's under `vmap` have its values and its first and second derivatives."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lightning_plugins.meta.loop.norms import LOOPED, VECTORIZED


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


IMAGES, WEIGHT, BIAS = 3 * draw(4, 3, 5, 2) + 1, draw(3, seed=1), draw(3, seed=2)
CASES = {
    "batch": (F.batch_norm, IMAGES, (None, None, WEIGHT, BIAS, True, 0.1, 0.3)),
    "batch without weights": (F.batch_norm, draw(6, 3), (None, None, None, None, True)),
    "instance": (F.instance_norm, IMAGES, (None, None, WEIGHT, BIAS, True, 0.1, 0.3)),
    "instance of sequences": (F.instance_norm, draw(4, 3, 7), ()),
    "layer": (F.layer_norm, IMAGES, ((5, 2), draw(5, 2, seed=1), draw(5, 2, seed=2), 0.3)),
    "layer without weights": (F.layer_norm, IMAGES, ((2,),)),
    "root mean square": (F.rms_norm, IMAGES, ((5, 2), draw(5, 2, seed=1), 0.3)),
    "root mean square without weights": (torch.rms_norm, IMAGES, ((2,),)),
}


def value_and_derivatives(norm, x, arguments):
    """The value, the gradient of a function of it, and the gradient of that gradient's length."""
    x = x.clone().requires_grad_()
    value = norm(x, *arguments)
    (first,) = torch.autograd.grad((value.sin() * draw(*value.shape, seed=3)).sum(), x, create_graph=True)
    return value, first, torch.autograd.grad(first.square().sum(), x)[0]


@pytest.mark.parametrize("case", CASES)
def test_value_and_derivatives_are_those_of_torch(case):
    norm, x, arguments = CASES[case]
    expected = value_and_derivatives(norm, x, arguments)
    torch.testing.assert_close(value_and_derivatives(VECTORIZED[norm], x, arguments), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("norm", [F.batch_norm, F.instance_norm])
def test_running_statistics_are_left_to_torch(norm):
    ours, theirs = ([torch.full((3,), 0.5).double(), torch.full((3,), 2.0).double()] for _ in range(2))
    for flag in (True, False):  # by the batch, which updates them, and by them
        found = VECTORIZED[norm](IMAGES, *ours, WEIGHT, BIAS, flag)
        torch.testing.assert_close(found, norm(IMAGES, *theirs, WEIGHT, BIAS, flag))
        torch.testing.assert_close(ours, theirs)
    assert (ours[0] != 0.5).all()


@pytest.mark.parametrize("norm", VECTORIZED)
def test_half_precision_is_computed_in_float32_and_returned(norm):
    shape = () if norm in (F.batch_norm, F.instance_norm) else ((2,),)
    settings = {"running_mean": None, "running_var": None, "training": True} if norm is F.batch_norm else {}
    x = (IMAGES / 1e2 + 3).to(torch.bfloat16)
    found = partial(VECTORIZED[norm], **settings)(x, *shape)
    assert found.dtype == torch.bfloat16
    eps = {"eps": 1e-5} if norm in (F.rms_norm, torch.rms_norm) else {}
    exact = partial(VECTORIZED[norm], **settings)(x.double(), *shape, **eps)
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-2)


def test_a_loop_replaces_batch_norm_alone():
    assert set(LOOPED) == {F.batch_norm}
