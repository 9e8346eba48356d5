"""Vectorised, looped and chunked tasks; modes of torch."""

import copy
import weakref
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from lightning_plugins.meta import (
    GAP,
    ApproximateGAP,
    Identity,
    InnerLoop,
    MetaSGD,
    Vectorization,
    use_batch_statistics,
)

MODES = {
    "vectorised": Vectorization(),
    "looped": Vectorization(mode=False),
    "chunked": Vectorization(chunk_size=2),
    "one at a time": Vectorization(mode=False, chunk_size=1),
    "one chunk": Vectorization(chunk_size=9),
}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(dropout=0.0):
    torch.manual_seed(0)
    return use_batch_statistics(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout),
            nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3),
        ).double()
    )  # fmt: skip


def batch(tasks=5, seed=0):
    return random(tasks, 6, 1, 4, 4, seed=seed), torch.arange(6).remainder(3).expand(tasks, 6)


def run(mode, preconditioner=Identity, dropout=0.0, randomness="different", call=(), **settings):
    """Result of a batch, and the gradients for all that is learned."""
    order = replace(MODES[mode], randomness=randomness)
    settings = {"steps": 2, "learning_rate": 0.2, **settings, "vectorize": order}
    loop = InnerLoop(network(dropout), F.cross_entropy, preconditioner(), **settings)
    for i, parameter in enumerate(loop.preconditioner.parameters()):
        parameter.data *= 1 + 0.3 * random(*parameter.shape, seed=i)
    torch.manual_seed(5)
    episodes = loop(batch(), batch(seed=1), **dict(call))
    (3 * episodes.loss).backward()
    return tuple(part.detach() for part in episodes), [parameter.grad for parameter in loop.parameters()]


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "vectorised"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preconditioner": MetaSGD, "first_order": True},
        {"preconditioner": GAP},
        {"preconditioner": lambda: GAP(linear=True, per_step=True, derivative="exact"), "rates": "learned"},
        {"preconditioner": ApproximateGAP, "rates": "learned_per_step", "call": [("step_weights", [0.3, 1.0])]},
        {"layers": "8"},
        {"dropout": 0.5, "randomness": "same"},
    ],
    ids=["MAML", "first order", "GAP", "exact GAP", "approximate GAP", "ANIL", "dropout"],
)
def test_modes_agree(settings, mode):
    expected, found = run("vectorised", **settings), run(mode, **settings)
    torch.testing.assert_close(found, expected)


class Functional(nn.Module):
    def forward(self, x):
        return F.rms_norm(F.layer_norm(x, (4, 4)), (4,))


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(3, affine=False, track_running_stats=False),
        lambda: nn.InstanceNorm2d(3, affine=True),
        lambda: nn.LayerNorm((3, 4, 4)),
        lambda: nn.RMSNorm((4,)),
        lambda: nn.GroupNorm(3, 3),
        lambda: nn.LocalResponseNorm(3),
        Functional,
    ],
    ids=["batch", "instance", "layer", "RMS", "group", "local response", "functional"],
)
def test_second_derivatives_of_norms_are_right_vectorised(norm):
    gradients = []
    for vectorize in (True, False):
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 3, 3, padding=1), norm(), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)
        loop = InnerLoop(nn.Sequential(*layers).double(), F.cross_entropy, learning_rate=0.3, vectorize=vectorize)
        loop(batch(), batch(seed=1)).loss.backward()
        gradients.append([parameter.grad for parameter in loop.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("mode", MODES)
def test_adapt_and_predict_agree_in_all_modes(mode):
    loops = [InnerLoop(network(), F.cross_entropy, GAP(), steps=2, vectorize=MODES[m]) for m in ("vectorised", mode)]
    adapted = [loop.adapt(batch()) for loop in loops]
    torch.testing.assert_close(adapted[1], adapted[0])
    outputs = [loop.predict(a, batch(seed=1)[0]) for loop, a in zip(loops, adapted, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0])


def test_dropout_is_repeated_by_the_seed_and_differs_between_tasks():
    first, again = run("vectorised", dropout=0.5), run("vectorised", dropout=0.5)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    for randomness, equal in (("different", False), ("same", True)):
        loop = InnerLoop(network(0.5), F.cross_entropy, vectorize=Vectorization(randomness=randomness))
        twice = [tensor[:1].expand(2, *tensor.shape[1:]) for tensor in batch()]
        losses = loop(twice, twice).losses
        assert torch.isclose(*losses).item() is equal


def test_the_check_of_the_first_call_draws_nothing():
    loop = InnerLoop(network(0.5), F.cross_entropy)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(loop(batch(), batch(seed=1)).losses)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


class Token:
    alive: ClassVar = weakref.WeakSet()
    most = 0


class Watched(Function):
    """The identity; its node of the graph holds a token, so that living ones can be counted."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.token = Token()
        Token.alive.add(ctx.token)
        Token.most = max(Token.most, len(Token.alive))

    @staticmethod
    def backward(ctx, grad):
        return Watched.apply(grad)


class Watch(nn.Module):
    def forward(self, x):
        return Watched.apply(x)


def most_alive(tasks, **settings):
    network = nn.Sequential(nn.Linear(2, 3), Watch(), nn.Linear(3, 1))
    loop = InnerLoop(network, F.mse_loss, steps=2, vectorize=Vectorization(**settings))
    x, y = random(tasks, 4, 2).float(), random(tasks, 4, 1).float()
    Token.most = 0
    loop((x, y), (x, y)).loss.backward()
    return Token.most


def test_memory_is_bounded_by_one_chunk():
    looped = {"mode": False}
    assert most_alive(8, **looped) > 1.9 * most_alive(4, **looped)  # control: all tasks' graphs are alive
    one = most_alive(1, **looped)
    assert most_alive(8, chunk_size=1, **looped) <= one
    assert most_alive(8, chunk_size=2, **looped) <= 2 * one


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context, mode):
    expected = InnerLoop(network(), F.cross_entropy, GAP(), steps=2, vectorize=MODES[mode])(batch(), batch(seed=1))
    loop = InnerLoop(network(), F.cross_entropy, GAP(), steps=2, vectorize=MODES[mode])  # whose first call is under it
    with context():
        support, query = (tuple(tensor.clone() for tensor in batch(seed=seed)) for seed in (0, 1))
        found = loop(support, query)
        outputs = loop.predict(loop.adapt(support), query[0])
    torch.testing.assert_close(tuple(found), tuple(part.detach() for part in expected))
    torch.testing.assert_close(outputs, expected.outputs)
    assert not found.loss.requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_inputs_from_a_body_outside_get_their_gradient(mode):
    inputs = batch()[0].requires_grad_()
    gradients = []
    for order in (MODES["vectorised"], MODES[mode]):
        loop = InnerLoop(network(), F.cross_entropy, steps=2, vectorize=order)
        loss = loop((inputs, batch()[1]), batch(seed=1)).loss
        gradients.append(torch.autograd.grad(loss, inputs)[0])
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_known_gradient_cannot_be_differentiated_again():
    loop = InnerLoop(network(), F.cross_entropy, steps=1, vectorize=Vectorization(chunk_size=2))
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = loop(batch(), batch(seed=1)).loss * factor
    (first,) = torch.autograd.grad(loss, loop.model[0].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        first.sum().backward()


def test_autocast_gives_what_it_gives_vectorised():
    losses = {}
    for mode in ("vectorised", "chunked"):
        loop = InnerLoop(network().float(), F.cross_entropy, GAP(), steps=2, vectorize=MODES[mode])
        support, query = ((x.float(), y) for x, y in (batch(), batch(seed=1)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = loop(support, query).loss
        loss.backward()
        losses[mode] = (loss.detach(), [parameter.grad for parameter in loop.parameters()])
    torch.testing.assert_close(losses["chunked"], losses["vectorised"], rtol=2e-2, atol=2e-2)


def test_norms_with_running_statistics():
    norms = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    x, y = random(2, 5, 3), random(2, 5, 1)
    loop = InnerLoop(norms, F.mse_loss)
    loop.eval()((x, y), (x, y))  # normalises by the statistics it has
    torch.testing.assert_close(norms[1].running_mean, torch.zeros(4, dtype=torch.float64))
    loop.train()
    with pytest.raises(ValueError, match=r"`model`: '1' \(BatchNorm1d\).*`use_batch_statistics\(model\)`"):
        loop((x, y), (x, y))
    with pytest.raises(ValueError, match="'1'"):
        loop.adapt((x, y))
    use_batch_statistics(norms)
    loop((x, y), (x, y))
    trained = loop((x, y), (x, y)).loss
    torch.testing.assert_close(loop.eval()((x, y), (x, y)).loss, trained)  # the same in evaluation: transductive


def test_can_be_copied():
    loop = InnerLoop(network(), F.cross_entropy, GAP(), rates="learned")
    torch.testing.assert_close(
        copy.deepcopy(loop)(batch(), batch(seed=1)).losses, loop(batch(), batch(seed=1)).losses, rtol=0, atol=0
    )
