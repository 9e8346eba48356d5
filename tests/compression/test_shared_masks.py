"""Masks computed together for a whole network: as each by itself, in every way a network is used, in few operations."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_plugins.compression import apply_masks, channel_groups
from lightning_plugins.compression.budget.budgeted_network import BudgetedNetwork
from lightning_plugins.compression.budget.choice import Choice
from lightning_plugins.compression.budget.filling import ChoiceRates, ChoiceSettings
from lightning_plugins.compression.gates import shared_masks
from lightning_plugins.compression.gates.masked_weight import Masked
from lightning_plugins.compression.gates.segments import Segments, numbers_of
from tests.compression.networks import NETWORKS, build, draw_kept


def masked(name, **settings):
    net, x = build(name)
    masks = apply_masks(net, channel_groups(net, x), beta=1.5, init=0.3, **settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for scores in masks.scores:
            scores.add_(torch.randn_like(scores), alpha=0.3)
    return net, x, masks


def gradients(net, x):
    net.zero_grad()
    out = net(x)
    out.square().sum().backward()
    return out, [parameter.grad for parameter in net.parameters()]


def each_by_itself(monkeypatch):
    monkeypatch.setattr(Masked, "scaled", scaled_alone)


def scaled_alone(self, weight):
    for dim, scale in self._own_scales().items():
        shape = [-1 if i == dim else 1 for i in range(weight.ndim)]
        weight = weight * scale.to(weight.dtype).reshape(shape)
    return weight


@pytest.mark.parametrize("gate", ["sigmoid", "straight_through", "hard_concrete", "hard"])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_those_of_each_mask_by_itself(name, gate, monkeypatch):
    net, x, masks = masked(name, gate="sigmoid" if gate == "hard" else gate)
    masks.draw(torch.Generator().manual_seed(0))
    if gate == "hard":
        masks.set_kept(draw_kept(masks.groups))
    out, grads = gradients(net, x)
    each_by_itself(monkeypatch)
    expected, wanted = gradients(net, x)
    torch.testing.assert_close(out, expected)
    for got, other in zip(grads, wanted, strict=True):
        if other is None:
            assert got is None or not got.any()
        else:
            torch.testing.assert_close(got, other)
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())


def test_other_processes_get_gradients_of_vectors_as_they_come(monkeypatch):
    net, x, _ = masked("residual")
    out, grads = gradients(net, x)
    monkeypatch.setattr(shared_masks, "is_distributed", lambda: True)
    alone, wanted = gradients(net, x)
    torch.testing.assert_close(alone, out)
    torch.testing.assert_close(grads, wanted)


class Skips(nn.Module):
    """Two branches, of which a pass takes one or both."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(6, 2)
        self.taken = (True, True)

    def forward(self, x):
        branches = (self.first, self.second)
        return self.head(sum(branch(x) for branch, taken in zip(branches, self.taken, strict=True) if taken))


def test_passes_that_skip_layers_share_nothing_with_an_earlier_graph():
    torch.manual_seed(0)
    net, x = Skips().double(), torch.randn(8, 4, dtype=torch.float64)
    masks = apply_masks(net, channel_groups(net, x))
    for taken in ((True, False), (False, True), (True, True), (False, True)):  # gradients add up, nothing changes
        net.taken = taken
        net(x).square().sum().backward()
    net.zero_grad()
    net.taken = (True, False)
    net(x).square().sum().backward()
    assert net.second[1].parametrizations.weight.original.grad is None  # it was not used: no optimizer moves it
    assert net.first[1].parametrizations.weight.original.grad is not None
    assert masks.scores[0].grad.any()


def test_a_pass_without_gradients_or_with_other_scores_is_no_answer_to_the_next():
    net, x, masks = masked("residual")
    with torch.inference_mode():
        net.eval()(x)
    with torch.no_grad():
        expected = net(x)
    out = net(x)
    torch.testing.assert_close(out, expected)
    assert out.requires_grad
    with torch.no_grad():
        masks.scores[0].fill_(-50.0)
    twin = copy.deepcopy(net)  # also in the middle: nothing of a graph is copied
    torch.testing.assert_close(net(x), twin(x))
    assert (net(x) - out).abs().max() > 1e-3


def test_a_change_between_forward_and_backward_is_noticed():
    net, x, masks = masked("residual")
    out = net(x).sum()
    with torch.no_grad():
        masks.scores[0].add_(1.0)
    with pytest.raises(RuntimeError, match="must not change between a forward and its backward"):
        out.backward()


def checkpoint_blocks(net, x):
    """The residual network, each part of which is computed again in the backward pass."""
    x = checkpoint(net.stem, x, use_reentrant=False)
    for block in net.blocks:
        x = x + checkpoint(block, x, use_reentrant=False)
    return net.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def test_activation_checkpointing_and_a_second_derivative(monkeypatch):
    net, x, _ = masked("residual")
    plain = gradients(net, x)[1]
    net.zero_grad()
    checkpoint_blocks(net, x).square().sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in net.parameters()], plain)

    def second():
        net.zero_grad()
        parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        first = torch.autograd.grad(net.eval()(x).square().sum(), parameters, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), parameters)

    found = second()
    each_by_itself(monkeypatch)
    torch.testing.assert_close(found, second(), rtol=1e-6, atol=1e-8)


class Operations(TorchDispatchMode):
    """Counts operations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ not in {"detach", "view", "select", "split", "alias", "unbind"}
        return func(*args, **(kwargs or {}))


def tower(depth):
    layers = [part for _ in range(depth) for part in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())]
    torch.manual_seed(0)
    return nn.Sequential(*layers, nn.Linear(8, 3))


def test_a_step_of_the_choice_takes_no_more_operations_in_a_deeper_network():
    """Four times as many groups: only the weights, which are no vectors, take operations of their own."""
    found = [step_operations(depth) for depth in (3, 12)]
    (act, forward, backward, step), (act_deep, forward_deep, backward_deep, step_deep) = found
    assert act_deep == act
    assert forward_deep - forward <= 9  # a product with the mask
    assert backward_deep - backward <= 9 * 4  # two products, a sum, and a transposition
    assert step_deep - step <= 9 * 2  # a product with the gradient, and its sum


def step_operations(depth):
    """Operations of a step for masks alone, by part."""
    bare, masked = (operations_of(tower(depth), masks) for masks in (False, True))
    return [other - one for one, other in zip(bare, masked, strict=True)]


def operations_of(net, masks):
    x, act, step = torch.randn(16, 8), int, int
    if masks:
        network = BudgetedNetwork(net, ChoiceSettings(budget=0.5, masks=True), inputs=x)
        choice = Choice(network, ChoiceRates())
        network.begin()
        act, step = partial(choice.act, 0.3), choice.step
    for _ in range(2):  # the first finds out where everything is
        found = [counted(act)[0]]
        count, loss = counted(lambda: net(x).sum())
        found += [count, counted(loss.backward)[0], counted(step)[0]]
    return found


def counted(work):
    with Operations() as operations:
        result = work()
    return operations.count, result


def test_sums_of_segments_are_those_of_index_add():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 7, (50,), generator=generator)
    entries = torch.randn(50, dtype=torch.float64, generator=generator)
    expected = torch.zeros(7, dtype=torch.float64).index_add_(0, targets, entries)[:5]
    torch.testing.assert_close(Segments(targets, 5).sums(entries), expected)
    sums = Segments(numbers_of([3, 0, 2]), 3).sums(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert sums.tolist() == [6.0, 0.0, 9.0]
    assert Segments(numbers_of([]), 0).sums(torch.zeros(0)).shape == (0,)
