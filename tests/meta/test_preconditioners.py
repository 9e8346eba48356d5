import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_plugins.functional.preconditioning import gap_precondition
from lightning_plugins.meta import GAP, ApproximateGAP, Identity, MetaSGD, Preconditioner

SHAPES = {
    "first.weight": (4, 2, 3, 3),
    "first.bias": (4,),
    "second.weight": (4, 2, 3, 3),
    "third.weight": (4, 4, 3, 3),
    "norm.weight": (4,),
    "head.weight": (3, 8),
}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters():
    return {name: random(*shape) for name, shape in SHAPES.items()}


def gradients():
    return {name: random(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}


def initialised(preconditioner, steps=3, spread=True):
    preconditioner.initialise(parameters(), steps)
    for i, parameter in enumerate(preconditioner.parameters()):
        if spread:
            parameter.data += random(*parameter.shape, seed=i)
    return preconditioner


def test_identity_has_no_parameters():
    assert list(initialised(Identity()).parameters()) == []
    assert Identity()(gradients(), 0).keys() == SHAPES.keys()


def test_gains_start_where_the_published_ones_do():
    for gains in initialised(GAP(), spread=False).gains().values():
        torch.testing.assert_close(gains, torch.full((4,), math.log1p(math.exp(2 * 0.928)) / 2))


@pytest.mark.parametrize("kind", [GAP, ApproximateGAP])
@pytest.mark.parametrize("linear", [False, True])
def test_kernels_have_gains_and_linear_weights_if_asked(kind, linear):
    gap, before = initialised(kind(linear=linear)), gradients()
    updates = gap(before, 0)
    matrices = ["first.weight", "second.weight", "third.weight", *(["head.weight"] if linear else [])]
    assert list(gap.gains()) == matrices
    for name, gradient in before.items():
        expected = gradient
        if name in matrices:
            matrix = gradient.reshape(len(gradient), -1)
            gains = F.softplus(gap.raw[name.replace(".", "/")], beta=2)
            expected = gap_precondition(matrix, gains, approximate=kind is ApproximateGAP).reshape(gradient.shape)
        torch.testing.assert_close(updates[name], expected)


def test_derivative_reaches_the_function():
    weight = random(4, 2, 3, 3).requires_grad_()
    found = {}
    for derivative in ("constant", "exact"):
        gap = GAP(derivative=derivative)
        gap.initialise({"weight": weight}, 1)
        gap.raw["weight"].data = torch.tensor([2.0, 0.1, 1.0, 0.5])
        (found[derivative],) = torch.autograd.grad(gap({"weight": weight}, 0)["weight"].pow(3).sum(), weight)
    assert (found["constant"] - found["exact"]).abs().max() > 1e-2


def test_bound_on_the_rank_reaches_the_function():
    gradient, gap, bounded = random(4, 8), GAP(linear=True), GAP(linear=True, rank=1)
    for each in (gap, bounded):
        each.initialise({"weight": gradient}, 1)
        each.raw["weight"].data = torch.tensor([2.0, 0.1, 1.0, 0.5])
    (before, after) = (each({"weight": gradient}, 0)["weight"] for each in (gap, bounded))
    assert (before - after).abs().max() > 1e-2
    low = gradient[:, :1] @ gradient[:1]
    torch.testing.assert_close(bounded({"weight": low}, 0), gap({"weight": low}, 0))
    with pytest.raises(ValueError, match="`rank`"):
        GAP(rank=0)


def test_gains_per_step_and_beyond_the_last():
    gap = initialised(GAP(per_step=True), steps=3)
    assert all(raw.shape == (3, 4) for raw in gap.raw.values())
    for step in range(3):
        expected = F.softplus(gap.raw["first/weight"][step], beta=2)
        torch.testing.assert_close(gap.gains(step)["first.weight"], expected)
    torch.testing.assert_close(gap(gradients(), 7)["first.weight"], gap(gradients(), 2)["first.weight"])
    assert not torch.equal(gap(gradients(), 1)["first.weight"], gap(gradients(), 2)["first.weight"])


def test_half_precision_gradients_stay_half():
    gap = GAP()
    gap.initialise({"weight": random(2, 3, 1, 1)}, 1)
    assert gap({"weight": random(2, 3, 1, 1).bfloat16()}, 0)["weight"].dtype == torch.bfloat16


def test_meta_sgd_has_a_factor_for_every_entry():
    meta_sgd, before = initialised(MetaSGD(initial=0.5)), gradients()
    assert {name: tuple(factor.shape) for name, factor in meta_sgd.factors.items()} == {
        name.replace(".", "/"): shape for name, shape in SHAPES.items()
    }
    updates = meta_sgd(before, 0)
    for name, gradient in before.items():
        torch.testing.assert_close(updates[name], meta_sgd.factors[name.replace(".", "/")] * gradient)
    assert all(factor.eq(0.5).all() for factor in initialised(MetaSGD(0.5), spread=False).parameters())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MetaSGD("1"), TypeError, "`initial` must be a number"),
        (lambda: MetaSGD(float("nan")), ValueError, "`initial` must be finite"),
        (lambda: GAP(derivative="exakt"), ValueError, "`derivative`.*did you mean 'exact'"),
        (lambda: GAP().initialise({"0.weight": torch.ones(2, 2)}, 1), ValueError, r"GAP: none of '0.weight' .*linear="),
        (lambda: ApproximateGAP(linear=True).initialise({"b": torch.ones(2)}, 1), ValueError, "none of 'b' is a conv"),
        (lambda: Preconditioner()({}, 0), NotImplementedError, r"must define `forward\(gradients, step\)`"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_parameters_are_in_the_state_dict():
    gap, other = initialised(GAP()), initialised(GAP(), spread=False)
    other.load_state_dict(gap.state_dict())
    torch.testing.assert_close(other(gradients(), 0), gap(gradients(), 0), rtol=0, atol=0)
    assert isinstance(gap.raw, nn.ParameterDict)
