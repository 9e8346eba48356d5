"""Costs of perturbed copies: as few passes as the bound allows, memory within it, and no value read in between."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_plugins.functional.attribution import (
    Perturbation,
    faithfulness_correlation,
    infidelity,
    perturbation_curve,
    sensitivity,
)
from tests.functional.test_attribution_curves import LENGTH, PATCH, batch, network

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class Watched(TorchDispatchMode):
    """Counts how often a value is read, for which an accelerator is waited for, and finds the largest tensor."""

    def __init__(self):
        super().__init__()
        self.reads = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.reads += func in READS
        self.largest = max(
            [self.largest, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))]
        )
        return out


def curve(rule):
    how = Perturbation(PATCH, "linear" if rule == "sequential" else rule, sequential=rule == "sequential")
    return lambda model, x, maps, target, steps, limit: perturbation_curve(
        model, x, maps, target, perturbation=how, steps=steps, max_forward_batch=limit
    )


CALLS = {
    **{f"curve, {rule}": curve(rule) for rule in ("mean", "uniform", "blur", "linear", "sequential")},
    "faithfulness": lambda model, x, maps, target, steps, limit: faithfulness_correlation(
        model, x, maps, target, draws=steps, max_forward_batch=limit
    ),
    "infidelity": lambda model, x, maps, target, steps, limit: infidelity(
        model, x, maps, target, draws=steps, max_forward_batch=limit
    ),
    "sensitivity": lambda model, x, maps, target, steps, limit: sensitivity(
        lambda inputs, classes: inputs.sin(), x, target, draws=steps, max_forward_batch=limit
    ),
}


def watch(name, steps, limit):
    x, maps, target = batch()
    with Watched() as seen:
        CALLS[name](network(), x, maps, target, steps, limit)
    return seen


@pytest.mark.parametrize("name", CALLS)
def test_no_value_is_read_for_a_step(name):
    assert watch(name, 2, 10_000).reads == watch(name, 6, 10_000).reads


@pytest.mark.parametrize("name", CALLS)
def test_no_tensor_is_larger_than_the_bound(name):
    for limit in (12, 20):
        assert watch(name, 6, limit).largest <= limit * LENGTH
    assert watch(name, 6, 10_000).largest == 5 * 7 * LENGTH  # all copies at once, where the bound lets them


@pytest.mark.parametrize(("limit", "passes"), [(100, 1), (7, 5), (35, 1), (34, 2)])
@pytest.mark.parametrize("sequential", [False, True])
def test_as_few_passes_as_the_bound_allows(limit, passes, sequential):
    (x, maps, target), model, seen = batch(), network(), []

    def forward(inputs):
        seen.append(len(inputs))
        return model(inputs)

    how = Perturbation(PATCH, "linear", sequential=sequential)
    perturbation_curve(forward, x, maps, target, perturbation=how, max_forward_batch=limit)
    assert max(seen) <= limit
    assert sum(seen) == 35  # 5 samples, 7 points
    assert len(seen) == passes or sequential  # whole states at a time: at most one more per pass
    assert len(seen) <= 2 * passes


def test_points_that_repeat_are_scored_once():
    (x, maps, target), model, seen = batch(), network(), []
    found = perturbation_curve(
        lambda inputs: seen.append(len(inputs)) or model(inputs),
        x,
        maps,
        target,
        perturbation=Perturbation(PATCH),
        steps=50,
    )
    assert sum(seen) == 35
    torch.testing.assert_close(found[:, 6:], found[:, 6:7].expand(5, 45))
