"""Thresholds on singular values: forward and backward against references, the cost of a step, and no trace left."""

import copy

import pytest
import torch
from torch import nn

from lightning_plugins.compression import (
    apply_masks,
    apply_thresholds,
    bake,
    bake_masks,
    channel_groups,
    remove_thresholds,
    thresholds_of,
)
from lightning_plugins.compression.gates import threshold_function as function
from lightning_plugins.compression.gates import thresholded as module
from lightning_plugins.functional import singular_value_threshold
from tests.compression.networks import build, draw_kept


def one_layer(shape=(5, 8), *, seed=0, zero_row=False, **settings):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False)).double()
    if zero_row:
        net[0].weight.data[1] = 0
        net[0].weight.data[2] = net[0].weight.data[3]
    return net, apply_thresholds(net, **settings)


@pytest.mark.parametrize("zero_row", [False, True])
@pytest.mark.parametrize("init", [0.0, 0.3, 0.9, 3.0])
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_weight_and_gradient_are_those_of_singular_value_threshold(shape, init, zero_row):
    net, thresholds = one_layer(shape, init=init, zero_row=zero_row)
    original = net[0].parametrizations.weight.original
    upstream = torch.randn(shape, dtype=torch.float64)
    lowered = net[0].weight
    (lowered * upstream).sum().backward()
    weight = original.detach().clone().requires_grad_()
    tau = thresholds.tau(0).detach().requires_grad_()
    expected = singular_value_threshold(weight, tau)
    (expected * upstream).sum().backward()
    torch.testing.assert_close(lowered, expected)
    if not init:  # the identity, also where a singular value is zero
        torch.testing.assert_close(original.grad, upstream)
    else:
        torch.testing.assert_close(original.grad, weight.grad)
        torch.testing.assert_close(thresholds.values[0].grad, tau.grad * thresholds.scales[0])


def test_the_gradient_is_that_of_finite_differences_where_autograd_is_not_stable():
    net, thresholds = one_layer((4, 4), init=0.4)
    original = net[0].parametrizations.weight.original
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    original.data.copy_(turn @ torch.diag(torch.tensor([2.0, 2.0, 2.0, 1e-9], dtype=torch.float64)))  # equal, and zero
    upstream, direction = torch.randn(2, 4, 4, dtype=torch.float64)

    def value():
        return (net[0].weight * upstream).sum() + thresholds.soft_ranks()["0"] * 0

    value().backward()
    numeric = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            original.add_(direction, alpha=step)
        numeric.append(value().item())
    slope = (numeric[0] - numeric[1]) / 2e-5
    assert (original.grad * direction).sum().item() == pytest.approx(slope, rel=1e-5)


def test_soft_ranks_have_the_gradient_of_finite_differences_and_become_hard():
    net, thresholds = one_layer((5, 8), init=0.35, beta=3.0)
    original, value = net[0].parametrizations.weight.original, thresholds.values[0]
    largest = torch.linalg.svdvals(original.detach())[0]

    def rank(weight, share):
        spectrum = torch.linalg.svdvals(weight)
        return torch.sigmoid(3.0 * (spectrum - share * thresholds.scales[0]) / largest).sum()

    got = torch.autograd.grad(thresholds.soft_ranks()["0"], [original, value])
    weight, share = original.detach().clone().requires_grad_(), value.detach().clone().requires_grad_()
    expected = torch.autograd.grad(rank(weight, share), [weight, share])
    torch.testing.assert_close(got, expected)
    thresholds.set_beta(1e6)
    hard = int((torch.linalg.svdvals(original.detach()) > thresholds.tau(0)).sum())
    assert thresholds.hard_ranks() == {"0": hard}
    assert thresholds.soft_ranks()["0"].item() == pytest.approx(hard)
    assert torch.linalg.matrix_rank(net[0].weight.detach()).item() == hard


def test_the_mask_comes_before_the_threshold():
    net, x = build("residual")
    groups = channel_groups(net, x)
    masks = apply_masks(net, groups)
    thresholds = apply_thresholds(net, "blocks.*", init=0.2)
    assert thresholds.layers == ("blocks.0.0", "blocks.0.6", "blocks.1.0", "blocks.1.6")  # no depthwise layers
    steps = net.blocks[0][0].parametrizations.weight
    masked = steps.original * masks.values()[1][:, None, None, None]
    expected = singular_value_threshold(masked.flatten(1), thresholds.tau(0))
    torch.testing.assert_close(net.blocks[0][0].weight.flatten(1), expected)
    net(x).sum().backward()
    assert masks.scores[1].grad.abs().sum() > 0
    assert all(value.grad is not None for value in thresholds.values)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_soft_ranks_of_masked_weights_have_the_gradient_of_a_decomposition(shape):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(shape[1], shape[0]), nn.ReLU(), nn.Linear(shape[0], 3)).double()
    masks = apply_masks(net, channel_groups(net, torch.zeros(1, shape[1], dtype=torch.float64)))
    torch.nn.init.normal_(masks.scores[0])
    thresholds = apply_thresholds(net, "0", init=0.3, beta=3.0)
    original, value = net[0].parametrizations.weight.original, thresholds.values[0]
    got = torch.autograd.grad(thresholds.soft_ranks()["0"], [original, masks.scores[0], value])
    spectrum = torch.linalg.svdvals(original * masks.mask(0)[:, None])
    expected = torch.sigmoid(3.0 * (spectrum - thresholds.tau(0)) / spectrum[0].detach()).sum()
    torch.testing.assert_close(got, torch.autograd.grad(expected, [original, masks.scores[0], value]))
    masks.set_kept([torch.arange(shape[0]) < 3])
    hard = torch.autograd.grad(thresholds.soft_ranks()["0"], original)[0]
    spectrum = torch.linalg.svdvals(original[:3])
    expected = torch.sigmoid(3.0 * (spectrum - thresholds.tau(0)) / spectrum[0].detach()).sum()
    torch.testing.assert_close(hard, torch.autograd.grad(expected, original)[0])


def counting(monkeypatch):
    calls = []
    decompose = module.decompose_wide
    monkeypatch.setattr(module, "decompose_wide", lambda *parts: calls.append(parts) or decompose(*parts))
    return calls


def test_batches_of_one_step_share_a_decomposition_and_the_backward_makes_none(monkeypatch):
    calls = counting(monkeypatch)
    net, x = build("residual")
    masks = apply_masks(net, channel_groups(net, x))
    thresholds = apply_thresholds(net, "head", init=0.1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        (net(x).sum() + thresholds.soft_ranks()["head"]).backward()
    assert len(calls) == 1
    optimizer.step()
    net(x)
    assert len(calls) == 2
    masks.set_beta(2.0)
    with torch.no_grad():
        thresholds.values[0].add_(0.1)
    net(x)
    assert len(calls) == 2  # the head has no mask on its weight, and a threshold needs no other decomposition


def test_a_mask_that_changes_makes_a_new_decomposition(monkeypatch):
    calls = counting(monkeypatch)
    net, x = build("residual")
    masks = apply_masks(net, channel_groups(net, x))
    apply_thresholds(net, "blocks.0.0", init=0.1)
    net(x)
    masks.set_beta(2.0)
    net(x)
    assert len(calls) == 2


def test_refreshing_rarely_holds_the_vectors_and_resumes(monkeypatch):
    calls = counting(monkeypatch)
    data = torch.randn(6, 8, dtype=torch.float64)

    def train(net, thresholds, steps):
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)  # so small that singular values stay above the threshold
        for _ in range(steps):
            optimizer.zero_grad()
            (net(data).square().sum() + thresholds.soft_ranks()["0"]).backward()
            optimizer.step()
            thresholds.clamp_()
            net.eval()(data)  # a validation in between must not count as a step
            net.train()

    straight, thresholds = one_layer(init=0.2, refresh_every=3)
    train(straight, thresholds, 7)
    assert len(calls) == 3  # steps 0, 3 and 6
    halfway, thresholds = one_layer(init=0.2, refresh_every=3)
    train(halfway, thresholds, 4)
    resumed, thresholds = one_layer(init=0.2, refresh_every=3, seed=1)
    resumed.load_state_dict(copy.deepcopy(halfway.state_dict()))
    train(resumed, thresholds, 3)
    torch.testing.assert_close(resumed.state_dict(), straight.state_dict(), rtol=0, atol=0)
    assert thresholds.hard_ranks()["0"] > 1


@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
def test_a_held_step_has_the_gradient_of_what_it_computes(shape):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(shape[1], shape[0]), nn.ReLU(), nn.Linear(shape[0], 3)).double()
    masks = apply_masks(net, channel_groups(net, torch.zeros(1, shape[1], dtype=torch.float64)))
    torch.nn.init.normal_(masks.scores[0])
    thresholds = apply_thresholds(net, "0", init=0.4, refresh_every=3)
    original, value = net[0].parametrizations.weight.original, thresholds.values[0]
    upstream = torch.randn(shape, dtype=torch.float64)

    def lowering_matrix(tau):
        """U diag(max(1 - tau / s, 0)) U.T of the masked weight as it is, on its shorter side."""
        masked = (original * masks.mask(0)[:, None]).detach()
        u, s, _ = torch.linalg.svd(masked if shape[0] < shape[1] else masked.T, full_matrices=False)
        return (u * (1 - tau / s).clamp_min(0)) @ u.T

    assert net[0].weight.shape == shape  # decomposes
    tau = thresholds.tau(0).detach().requires_grad_()
    matrix = lowering_matrix(tau)
    for turn in (0, 1):
        with torch.no_grad():
            original.add_(torch.randn_like(original), alpha=0.1)
            masks.scores[0].sub_(0.3)
            value.mul_(1.5)  # from the next decomposition on
        masked = original * masks.mask(0)[:, None]
        expected = matrix @ masked if shape[0] < shape[1] else masked @ matrix
        wanted = torch.autograd.grad((expected * upstream).sum(), [original, masks.scores[0]], retain_graph=True)
        terms = expected * upstream
        columns = (terms if shape[0] < shape[1] else terms.T)[:, turn::2]  # both steps together take all
        (of_tau,) = torch.autograd.grad(2 * columns.sum(), tau, retain_graph=True)
        held = net[0].weight
        got = torch.autograd.grad((held * upstream).sum(), [original, masks.scores[0], value])
        torch.testing.assert_close(held, expected)
        torch.testing.assert_close(got, (*wanted, of_tau * thresholds.scales[0]))
    with torch.no_grad():
        original.mul_(1.1)
    renewed = net[0].weight
    got = torch.autograd.grad((renewed * upstream).sum(), [original, masks.scores[0], value])
    masked = original * masks.mask(0)[:, None]
    lowered = singular_value_threshold(masked, thresholds.tau(0))
    exact = torch.autograd.grad((lowered * upstream).sum(), [original, masks.scores[0], value], retain_graph=True)
    matrix = lowering_matrix(thresholds.tau(0).detach())
    product = matrix @ masked if shape[0] < shape[1] else masked @ matrix
    plain = torch.autograd.grad((product * upstream).sum(), [original, masks.scores[0]])
    torch.testing.assert_close(renewed, lowered)
    # The mean of this gradient and two with the same matrix held is the exact one.
    torch.testing.assert_close([(g + 2 * p) / 3 for g, p in zip(got, plain, strict=False)], list(exact[:2]))
    torch.testing.assert_close(got[2], exact[2])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_with_held_matrices_comes_to_nearly_the_same(seed):
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(64, 24, dtype=torch.float64, generator=generator)
    left, right = torch.randn(2, 24, 3, dtype=torch.float64, generator=generator)
    target = data @ left @ right.T[:, :16] / 24
    found = []
    for every in (1, 4):
        net, thresholds = one_layer((16, 24), init=0.3, beta=3.0, refresh_every=every)
        start = net[0].weight.detach()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for _ in range(200):
            optimizer.zero_grad()
            loss = (net(data) - target).square().mean()
            (loss + 1e-3 * thresholds.soft_ranks()["0"]).backward()
            optimizer.step()
            thresholds.clamp_()
        ranks = thresholds.hard_ranks()  # decomposes: the weight below is low-rank by the present threshold
        found.append((net[0].weight.detach(), thresholds.values[0].item(), ranks, loss.item()))
    (exact, tau, ranks, loss), (held, held_tau, held_ranks, held_loss) = found
    assert 0 < torch.dist(held, exact) < 0.03 * torch.dist(start, exact)
    assert held_tau == pytest.approx(tau, abs=0.02)
    assert held_loss == pytest.approx(loss, rel=0.01)
    assert held_ranks == ranks


def test_training_goes_on_with_what_a_validation_decomposed():
    net, thresholds = one_layer(init=0.2)
    with torch.inference_mode():
        net.eval()(torch.randn(2, 8, dtype=torch.float64))
    (net.train()(torch.randn(2, 8, dtype=torch.float64)).sum() + thresholds.soft_ranks()["0"]).backward()
    assert net[0].parametrizations.weight.original.grad.isfinite().all()


def test_masks_leave_rows_to_thresholds_and_take_them_back():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    masks = apply_masks(net, channel_groups(net, torch.zeros(1, 8, dtype=torch.float64)))
    torch.nn.init.normal_(masks.scores[0])
    masked = net[0].weight
    thresholds = apply_thresholds(net, "0", init=0.2)
    assert net[0].parametrizations.weight[0].deferred
    thresholds.bypass = True
    torch.testing.assert_close(net[0].weight, masked, rtol=0, atol=0)
    twin = copy.deepcopy(net)
    remove_thresholds(twin)
    torch.testing.assert_close(twin[0].weight, masked, rtol=0, atol=0)
    masks.set_hard()
    masked = net[0].weight
    bake_masks(net)  # and the thresholds stay on
    torch.testing.assert_close(net[0].weight, masked, rtol=0, atol=0)


def test_baking_and_removing():
    net, x = build("residual")
    plain, expected = copy.deepcopy(net.state_dict()), net(x)
    groups = channel_groups(net, x)
    masks = apply_masks(net, groups)
    apply_thresholds(net, init=0.3)
    twin = copy.deepcopy(net)
    remove_thresholds(twin)
    assert thresholds_of(twin) is None
    from lightning_plugins.compression import remove_masks

    remove_masks(twin)
    assert list(twin.state_dict()) == list(plain)
    torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    masks.set_kept(draw_kept(groups))
    before, ranks = net(x), thresholds_of(net).hard_ranks()
    bake(net)
    assert list(net.state_dict()) == list(plain)
    torch.testing.assert_close(net(x), before)
    rank = torch.linalg.matrix_rank(net.blocks[0][0].weight.detach().flatten(1)).item()
    assert rank == ranks["blocks.0.0"] < 12


def test_half_precision_weights_and_values_that_are_not_finite():
    net = nn.Sequential(nn.Linear(6, 4)).bfloat16()
    apply_thresholds(net, init=0.1)
    net(torch.randn(2, 6, dtype=torch.bfloat16)).sum().backward()
    assert net[0].weight.dtype == torch.bfloat16
    with torch.no_grad():
        net[0].parametrizations.weight.original[0, 0] = torch.nan
    assert net[0].weight.isnan().all()


def test_bad_inputs_are_named():
    net, x = build("residual")
    cases = [
        ({"beta": 0}, "`beta` must be positive"),
        ({"init": -0.1}, "`init` must be at least 0"),
        ({"refresh_every": 0}, "`refresh_every` must be at least 1"),
        ({"layers": "blocks.0.3"}, "`layers`: 'blocks.0.3' must be a layer that can be split"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            apply_thresholds(net, **settings)
    with pytest.raises(ValueError, match="`model` must have thresholds to remove"):
        remove_thresholds(net)
    thresholds = apply_thresholds(net)
    with pytest.raises(ValueError, match="`model` must have no thresholds yet"):
        apply_thresholds(net)
    with pytest.raises(ValueError, match="`beta` must be positive"):
        thresholds.set_beta(0)
    with pytest.raises(ValueError, match="`model` must get its masks before its thresholds"):
        apply_masks(net, channel_groups(build("residual")[0], x))


def test_a_compiled_module_learns_masks_and_thresholds():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(2, 4)
    masks = apply_masks(net, channel_groups(net, x))
    thresholds = apply_thresholds(net, init=0.1)
    net(x).sum().backward()
    expected = [parameter.grad.clone() for parameter in (*masks.scores, *thresholds.values)]
    net.zero_grad()
    compiled = torch.compile(net, backend="aot_eager")
    compiled(x).sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in (*masks.scores, *thresholds.values)], expected)


@pytest.mark.parametrize("shape", [(160, 16, 3, 4), (300, 12, 5, 5), (300, 130, 1, 1), (16, 24, 1, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_float32_weights_of_convolutions_in_any_memory_format(shape, memory_format):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(shape[1], shape[0], shape[2:])).to(memory_format=memory_format)
    thresholds = apply_thresholds(net, init=0.2)
    original, upstream = net[0].parametrizations.weight.original, torch.randn(shape)
    got = torch.autograd.grad((net[0].weight * upstream).sum(), [original, thresholds.values[0]])
    weight = original.detach().double().requires_grad_()
    value = thresholds.values[0].detach().double().requires_grad_()
    lowered = singular_value_threshold(weight.flatten(1), value * thresholds.scales[0].double()).reshape(shape)
    expected = torch.autograd.grad((lowered * upstream).sum(), [weight, value])
    if weight.flatten(1).shape[0] <= weight.flatten(1).shape[1]:
        assert net[0].weight.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(net[0].weight.double(), lowered, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got[1].double(), expected[1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("init", [0.0, 1e-30, 0.5])
@pytest.mark.parametrize("rank", [0, 1])
def test_float32_weights_without_full_rank_have_finite_gradients(rank, init):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(200, 150, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.randn(150, rank) @ torch.randn(rank, 200))
    thresholds = apply_thresholds(net, init=init)
    (net[0].weight.sum() + thresholds.soft_ranks()["0"]).backward()
    original, value = net[0].parametrizations.weight.original, thresholds.values[0]
    assert original.grad.isfinite().all()
    assert value.grad.isfinite()
    share = 1 - init if rank else 0
    torch.testing.assert_close(net[0].weight, share * original, rtol=1e-3, atol=1e-4)


def test_products_are_those_of_matrices():
    wide, grad = torch.randn(2, 300, 400)
    square, half = torch.randn(300, 300), torch.randn(150, 400)
    assert function._by_convolution(square, wide) == torch.backends.mkl.is_available()
    torch.testing.assert_close(function._product(square, wide), square @ wide, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(function._product(square, grad.mT[:300]), square @ grad.mT[:300], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(function._product_of_rows(half, wide), half @ wide.mT, rtol=1e-4, atol=1e-4)
    gram = torch.tril(function._lower_gram(wide))
    torch.testing.assert_close(gram, torch.tril(wide @ wide.mT), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_of_rows_that_are_closed_counts_for_no_rank(dtype):
    """A threshold of zero passes every singular value that is one, and none that rounding made."""
    for seed in range(40):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(40, 30, bias=False)).to(dtype)
        net[0].weight.data[:12] = 0
        net[0].weight.data[12] = net[0].weight.data[13] + net[0].weight.data[14]
        thresholds = apply_thresholds(net, init=0.0)
        assert thresholds.hard_ranks() == {"0": 17}, seed
    assert torch.linalg.matrix_rank(net[0].parametrizations.weight.original.detach()) == 17
