"""Meta-gradients, against finite differences and against the published update by plain autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call

from lightning_plugins.meta import GAP, ApproximateGAP, Identity, InnerLoop, MetaSGD, Preconditioner

PRECONDITIONERS = {
    "MAML": Identity,
    "Meta-SGD": MetaSGD,
    "GAP": lambda: GAP(linear=True, derivative="exact"),
    "GAP per step": lambda: GAP(linear=True, derivative="exact", per_step=True),
    "approximate GAP": lambda: ApproximateGAP(linear=True),
}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 5, 2), nn.Tanh(), nn.Conv2d(5, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1)
    ).double()  # fmt: skip


def batch(tasks=3, samples=6, shape=(1,), seed=0):
    inputs = random(tasks, samples, *shape, seed=seed)
    return inputs, inputs.flatten(2).sum(-1, keepdim=True).sin() + random(tasks, 1, 1, seed=seed + 1)


def spread(loop):
    """Move what is learned away from where it starts, gains by about a half."""
    generator = torch.Generator().manual_seed(3)
    for parameter in (*loop.preconditioner.parameters(), *loop.rates.parameters()):
        noise = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype) - 0.5
        parameter.data *= 1 + noise
    return loop


def meta_gradient(loop, *batches, **settings):
    loop.zero_grad()
    loop(*batches, **settings).loss.backward()
    return {name: parameter.grad for name, parameter in loop.named_parameters()}


def assert_is_derivative(loop, **settings):
    names, values = zip(*loop.named_parameters(), strict=True)
    support, query = batch(seed=1), batch(samples=4, seed=5)

    def loss(*values):
        return functional_call(loop, dict(zip(names, values, strict=True)), (support, query), settings).loss

    assert gradcheck(loss, values)


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_meta_gradient_is_that_of_finite_differences(name):
    assert_is_derivative(spread(InnerLoop(mlp(), F.mse_loss, PRECONDITIONERS[name](), steps=2, learning_rate=0.3)))


@pytest.mark.parametrize("settings", [{"rates": "learned"}, {"rates": "learned_per_step"}, {"layers": "4"}], ids=str)
def test_meta_gradient_of_variants_is_that_of_finite_differences(settings):
    gap = GAP(linear=True, derivative="exact")
    assert_is_derivative(spread(InnerLoop(mlp(), F.mse_loss, gap, steps=2, learning_rate=0.3, **settings)))


@pytest.mark.parametrize("settings", [{"step_weights": [0.5, 0.2, 1.0]}, {"steps": 4}, {"steps": 0}], ids=str)
def test_meta_gradient_of_calls_is_that_of_finite_differences(settings):
    loop = InnerLoop(mlp(), F.mse_loss, steps=3, learning_rate=0.3)
    assert_is_derivative(loop, **settings)


def plain_update(gradient, raw, approximate):
    """The published update of a matrix."""
    gains, (m, n) = F.softplus(raw, beta=2), gradient.shape
    if approximate:
        return torch.diag(gains) @ gradient if m <= n else gradient @ torch.diag(gains)
    u = torch.linalg.svd(gradient.detach(), full_matrices=False)[0]
    return u @ torch.diag(gains) @ u.T @ gradient


def plain_loss(forward, weights, raw, support, query, *, steps, rate, approximate=False, first_order=False):
    """One task after the other, by plain autograd; ``raw`` goes with ``weights``, None for a plain gradient."""
    total = 0
    for x, y, query_x, query_y in zip(*support, *query, strict=True):
        current = weights
        for _ in range(steps):
            gradients = torch.autograd.grad(F.mse_loss(forward(current, x), y), current, create_graph=not first_order)
            current = [
                w - rate * (g if r is None else plain_update(g.flatten(1), r, approximate).view_as(g))
                for w, g, r in zip(current, gradients, raw, strict=True)
            ]
        total = total + F.mse_loss(forward(current, query_x), query_y)
    return total / len(support[0])


def plain_mlp(w, x):
    return torch.tanh(torch.tanh(x @ w[0].T + w[1]) @ w[2].T + w[3]) @ w[4].T + w[5]


def plain_convolutional(w, x):
    x = torch.tanh(F.conv2d(torch.tanh(F.conv2d(x, w[0], w[1])), w[2], w[3]))
    return x.flatten(1) @ w[4].T + w[5]


CASES = {
    "linear": (mlp, plain_mlp, (1,), {"linear": True}),
    "convolutional": (convolutional, plain_convolutional, (1, 4, 4), {}),
}


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_update_by_plain_autograd(case, first_order, approximate):
    model, forward, shape, settings = CASES[case]
    gap = ApproximateGAP(**settings) if approximate else GAP(**settings)
    loop = spread(InnerLoop(model(), F.mse_loss, gap, steps=3, learning_rate=0.2, first_order=first_order))
    support, query = batch(shape=shape), batch(samples=5, shape=shape, seed=7)
    weights = [w.detach().clone().requires_grad_() for w in loop.model.parameters()]
    raw = [None] * len(weights)
    for i, (name, _) in enumerate(loop.model.named_parameters()):
        if name.replace(".", "/") in gap.raw:
            raw[i] = gap.raw[name.replace(".", "/")].detach().clone().requires_grad_()
    expected = plain_loss(
        forward, weights, raw, support, query, steps=3, rate=0.2, approximate=approximate, first_order=first_order
    )
    found = loop(support, query)
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.losses.mean(), expected)
    learned = [*weights, *(r for r in raw if r is not None)]
    found.loss.backward()
    expected_gradients = torch.autograd.grad(expected, learned)
    torch.testing.assert_close([p.grad for p in loop.parameters()], list(expected_gradients))


def test_first_order_is_another_gradient():
    support, query = batch(), batch(seed=7)
    loops = [InnerLoop(mlp(), F.mse_loss, learning_rate=0.3, first_order=first) for first in (False, True)]
    second, first = (meta_gradient(loop, support, query) for loop in loops)
    assert max((second[name] - first[name]).abs().max() for name in second) > 1e-3


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("layers", ["4", "0", ["0", "4"]])
def test_first_order_with_some_layers(layers, vectorize):
    """The layers that do not adapt learn from the query loss alone: through no inner gradient, which is a constant."""
    loop = InnerLoop(mlp(), F.mse_loss, layers=layers, learning_rate=0.3, first_order=True, vectorize=vectorize)
    found = meta_gradient(loop, batch(), batch(seed=7))
    adapted = loop.adapt(batch())
    query_x, query_y = batch(seed=7)
    free = {name: parameter.detach().requires_grad_() for name, parameter in loop.model.named_parameters()}
    losses = []
    for task in range(len(query_x)):
        moved = {
            name: parameters[task].detach() - loop.model.get_parameter(name) for name, parameters in adapted.items()
        }
        own = {
            name: parameter + moved[name].detach() if name in moved else parameter for name, parameter in free.items()
        }
        losses.append(F.mse_loss(torch.func.functional_call(loop.model, own, query_x[task]), query_y[task]))
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(free.values()))
    torch.testing.assert_close([found[f"model.{name}"] for name in free], list(expected))


@pytest.mark.parametrize("vectorize", [True, False])
def test_every_step_has_the_rate_of_its_own(vectorize):
    """Rates that differ between steps; steps beyond those of training use the last one."""
    rates = [0.3, -0.1, 0.5]
    loop = InnerLoop(mlp(), F.mse_loss, steps=3, rates="learned_per_step", vectorize=vectorize)
    for rate in loop.rates.values():
        rate.data = torch.tensor(rates, dtype=torch.float64)
    (x, y), weights = batch(), dict(loop.model.named_parameters())
    for task in range(len(x)):
        own = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
        for steps in range(1, 6):
            loss = F.mse_loss(torch.func.functional_call(loop.model, own, x[task]), y[task])
            gradients = torch.autograd.grad(loss, list(own.values()))
            rate = rates[min(steps - 1, 2)]
            own = {
                name: (weight - rate * gradient).detach().requires_grad_()
                for (name, weight), gradient in zip(own.items(), gradients, strict=True)
            }
            adapted = loop.adapt((x, y), steps=steps)
            torch.testing.assert_close({name: parameters[task] for name, parameters in adapted.items()}, own)


def test_every_rate_learns_from_its_own_step():
    loop = InnerLoop(mlp(), F.mse_loss, steps=3, learning_rate=0.3, rates="learned_per_step")
    gradient = meta_gradient(loop, batch(), batch(seed=7))
    for name, rate in loop.rates.items():
        for step in range(3):
            losses = []
            for change in (1e-6, -2e-6):
                with torch.no_grad():
                    rate[step] += change
                losses.append(loop(batch(), batch(seed=7)).loss.detach())
            with torch.no_grad():
                rate[step] += 1e-6
            torch.testing.assert_close(
                (losses[0] - losses[1]) / 2e-6, gradient[f"rates.{name}"][step], rtol=1e-5, atol=1e-8
            )


def test_only_chosen_layers_adapt_but_all_learn():
    """ANIL: the head adapts, the body learns from task to task alone."""
    loop = InnerLoop(mlp(), F.mse_loss, layers="4", learning_rate=0.3)
    adapted = loop.adapt(batch())
    assert list(adapted) == ["4.weight", "4.bias"]
    gradient = meta_gradient(loop, batch(), batch(seed=7))
    assert all(gradient[f"model.{name}"].abs().max() > 0 for name, _ in loop.model.named_parameters())


def test_frozen_parameters_neither_adapt_nor_learn():
    model = mlp()
    model[0].requires_grad_(False)
    loop = InnerLoop(model, F.mse_loss)
    assert list(loop.adapt(batch())) == ["2.weight", "2.bias", "4.weight", "4.bias"]
    assert meta_gradient(loop, batch(), batch(seed=7))["model.0.weight"] is None


def test_the_model_is_not_changed():
    loop = InnerLoop(mlp(), F.mse_loss, learning_rate=0.3)
    loop(batch(), batch(seed=7)).loss.backward()
    torch.testing.assert_close(loop.model.state_dict(), mlp().state_dict(), rtol=0, atol=0)


def test_adapt_and_predict_are_what_the_call_does():
    loop, support, query = InnerLoop(mlp(), F.mse_loss, learning_rate=0.3), batch(), batch(seed=7)
    episodes = loop(support, query, steps=2)
    outputs = loop.predict(loop.adapt(support, steps=2), query[0])
    torch.testing.assert_close(outputs, episodes.outputs)
    torch.testing.assert_close((outputs - query[1]).square().mean((1, 2)), episodes.losses)
    assert episodes.outputs.requires_grad
    assert episodes.losses.requires_grad


def test_a_model_of_one_parameter_predicts():
    loop = InnerLoop(nn.Linear(1, 1, bias=False).double(), F.mse_loss, steps=1)
    torch.testing.assert_close(loop.predict(loop.adapt(batch()), batch()[0]), loop(batch(), batch()).outputs)


def test_step_weights_add_up_the_losses_after_each_step():
    loop, batches = InnerLoop(mlp(), F.mse_loss, steps=3, learning_rate=0.3), (batch(), batch(seed=7))
    after = [loop(*batches, steps=steps).loss for steps in (1, 2, 3)]
    weighted = loop(*batches, step_weights=[0.25, 0.0, 2.0])
    torch.testing.assert_close(weighted.loss, 0.25 * after[0] + 2.0 * after[2])
    torch.testing.assert_close(weighted.losses.mean(), after[2].detach())


def test_meta_sgd_and_learned_rates_start_as_maml():
    batches = (batch(), batch(seed=7))
    expected = InnerLoop(mlp(), F.mse_loss, learning_rate=0.3)(*batches).loss
    for settings in ({"preconditioner": MetaSGD()}, {"rates": "learned"}, {"rates": "learned_per_step"}):
        loop = InnerLoop(mlp(), F.mse_loss, learning_rate=0.3, **settings)
        torch.testing.assert_close(loop(*batches).loss, expected)
        plain = InnerLoop(mlp(), F.mse_loss, learning_rate=0.3)
        torch.testing.assert_close(loop(*batches, steps=7).loss, plain(*batches, steps=7).loss)


def test_a_preconditioner_of_ones_own():
    class Damped(Preconditioner):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, gradients, step):
            return {name: self.scale / (1 + step) * gradient for name, gradient in gradients.items()}

    assert_is_derivative(InnerLoop(mlp(), F.mse_loss, Damped(), steps=2, learning_rate=0.3))


def test_state_dict_holds_all_that_is_learned():
    loop = spread(InnerLoop(mlp(), F.mse_loss, GAP(linear=True), rates="learned"))
    other = InnerLoop(mlp(), F.mse_loss, GAP(linear=True), rates="learned")
    other.load_state_dict(loop.state_dict())
    batches = (batch(), batch(seed=7))
    torch.testing.assert_close(other(*batches), loop(*batches), rtol=0, atol=0)


def sinusoids(tasks, generator):
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=generator)
    phase = math.pi * torch.rand(tasks, 1, 1, generator=generator)
    inputs = 10 * torch.rand(tasks, 20, 1, generator=generator) - 5
    targets = amplitude * (inputs - phase).sin()
    return (inputs[:, :10], targets[:, :10]), (inputs[:, 10:], targets[:, 10:])


@pytest.mark.parametrize("preconditioner", [Identity, lambda: GAP(linear=True)], ids=["MAML", "GAP"])
def test_learns_to_adapt_to_sinusoids(preconditioner):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    loop = InnerLoop(model, F.mse_loss, preconditioner(), steps=1, learning_rate=0.01)
    held_out = sinusoids(100, generator)
    before = loop(*held_out)
    optimizer = torch.optim.Adam(loop.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loop(*sinusoids(25, generator)).loss.backward()
        optimizer.step()
    after, unadapted = loop(*held_out), loop(*held_out, steps=0)
    assert after.loss < 0.8 * unadapted.loss
    assert after.loss < 0.8 * before.loss
