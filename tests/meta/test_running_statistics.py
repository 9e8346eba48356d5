"""Batch norms with statistics of their own for every inner step, against a plain loop; features and curves."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_plugins.meta import GAP, InnerLoop, PerStepBatchNorm, Vectorization, use_per_step_statistics
from tests._processes import run_on_ranks

MODES = {
    "vectorised": Vectorization(),
    "looped": Vectorization(mode=False),
    "chunked": Vectorization(chunk_size=2),
    "one at a time": Vectorization(mode=False, chunk_size=1),
}
RATE, STEPS = 0.2, 2


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_network(**settings):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4, **settings), nn.Tanh(), nn.Flatten(),
        nn.Linear(64, 5), nn.BatchNorm1d(5, **settings), nn.Tanh(), nn.Linear(5, 3),
    ).double()  # fmt: skip


def network(**settings):
    return use_per_step_statistics(plain_network(**settings), STEPS)


def batch(tasks=5, seed=0, samples=6):
    return random(tasks, samples, 1, 4, 4, seed=seed) + seed, torch.arange(samples).remainder(3).expand(tasks, samples)


def norms(model):
    return [module for module in model.modules() if isinstance(module, PerStepBatchNorm)]


def by_hand(support, query, step_weights=None, momentum=0.1):
    """One task after the other through torch's own norms, whose running statistics are read after every pass."""
    model = plain_network(momentum=1.0)  # its running statistics are those of the last pass
    seen = {}
    total = 0
    for x, y, query_x, query_y in zip(*support, *query, strict=True):
        current = dict(model.named_parameters())

        def measure(row, inputs, targets, current):
            loss = F.cross_entropy(torch.func.functional_call(model, current, (inputs,)), targets)
            for i in (1, 5):
                seen.setdefault((i, row), []).append((model[i].running_mean.clone(), model[i].running_var.clone()))
            return loss

        for step in range(STEPS):
            gradients = torch.autograd.grad(measure(step, x, y, current), list(current.values()), create_graph=True)
            current = {name: p - RATE * g for (name, p), g in zip(current.items(), gradients, strict=True)}
            if step == STEPS - 1 or step_weights is not None:
                loss = measure(step + 1, query_x, query_y, current)
                total = total + (1 if step_weights is None else step_weights[step]) * loss
    statistics = {}
    for (i, row), pairs in seen.items():
        mean, var = (torch.stack(parts).mean(0) for parts in zip(*pairs, strict=True))
        statistics[i, row] = momentum * mean, 1 - momentum + momentum * var
    return total / len(support[0]), dict(model.named_parameters()), statistics


@pytest.mark.parametrize("step_weights", [None, [0.4, 1.0]])
@pytest.mark.parametrize("mode", MODES)
def test_one_call_is_that_of_a_plain_loop(mode, step_weights):
    loop = InnerLoop(network(), F.cross_entropy, steps=STEPS, learning_rate=RATE, vectorize=MODES[mode])
    expected, parameters, statistics = by_hand(batch(), batch(seed=1), step_weights)
    found = loop(batch(), batch(seed=1), step_weights=step_weights)
    torch.testing.assert_close(found.loss, expected)
    expected_gradients = torch.autograd.grad(expected, list(parameters.values()))
    found.loss.backward()
    torch.testing.assert_close([p.grad for p in loop.model.parameters()], list(expected_gradients))
    assert set(statistics) == {(i, row) for i in (1, 5) for row in range(STEPS + 1)}
    for (i, row), (mean, var) in statistics.items():
        torch.testing.assert_close(loop.model[i].running_mean[row], mean)
        torch.testing.assert_close(loop.model[i].running_var[row], var)
        assert loop.model[i].num_batches_tracked[row] == 1


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "vectorised"])
def test_statistics_do_not_depend_on_the_mode(mode):
    states = []
    for order in (MODES["vectorised"], MODES[mode]):
        loop = InnerLoop(network(momentum=None), F.cross_entropy, GAP(), steps=STEPS, vectorize=order)
        for seed in (0, 2, 4):
            loop(batch(seed=seed), batch(seed=seed + 1))
        states.append(loop.state_dict())
    torch.testing.assert_close(states[1], states[0])


def test_without_a_momentum_they_are_the_mean_over_all_calls():
    both = []
    for seeds in ((0,), (2,), (0, 2)):
        loop = InnerLoop(network(momentum=None), F.cross_entropy, steps=STEPS)
        for seed in seeds:
            loop(batch(seed=seed), batch(seed=seed))
        both.append([norm.running_var for norm in norms(loop)])
    torch.testing.assert_close([(a + b) / 2 for a, b in zip(*both[:2], strict=True)], both[2])


def trained():
    loop = InnerLoop(network(), F.cross_entropy, steps=STEPS, learning_rate=RATE)
    for seed in range(3):
        loop(batch(seed=seed), batch(seed=seed))
    return loop.eval()


def test_evaluation_uses_the_statistics_of_the_step():
    """By torch's own norms in evaluation mode, filled with the row that belongs to the step."""
    loop, support, query = trained(), batch(seed=7), batch(seed=8)
    before = {name: value.clone() for name, value in loop.state_dict().items()}
    model = plain_network().eval()

    def forward(row, inputs, current):
        for i in (1, 5):
            model[i].running_mean.copy_(loop.model[i].running_mean[min(row, STEPS)])
            model[i].running_var.copy_(loop.model[i].running_var[min(row, STEPS)])
        return torch.func.functional_call(model, current, (inputs,))

    current = {name: p.detach() for name, p in model.named_parameters()}
    expected = [F.cross_entropy(forward(0, query[0][0], current), query[1][0])]
    for step in range(STEPS + 2):
        leaves = {name: p.requires_grad_() for name, p in current.items()}
        loss = F.cross_entropy(forward(step, support[0][0], leaves), support[1][0])
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        current = {name: (p - RATE * g).detach() for (name, p), g in zip(leaves.items(), gradients, strict=True)}
        expected.append(F.cross_entropy(forward(step + 1, query[0][0], current), query[1][0]))
    losses, outputs = loop.curve(support, query, steps=STEPS + 2)
    torch.testing.assert_close(losses[0], torch.stack(expected).detach())
    torch.testing.assert_close(loop(support, query, steps=STEPS + 2).losses, losses[:, -1])
    for steps in (0, 1, STEPS + 2):
        adapted = loop.adapt(support, steps=steps)
        torch.testing.assert_close(loop.predict(adapted, query[0], steps=steps).detach(), outputs[:, steps])
    torch.testing.assert_close(loop.state_dict(), before, rtol=0, atol=0)  # evaluation updates nothing


def test_query_samples_do_not_see_each_other_in_evaluation():
    loop, support, (x, y) = trained(), batch(seed=7), batch(seed=8)
    whole = loop(support, (x, y)).outputs
    alone = loop(support, (x[:, :1], y[:, :1])).outputs
    torch.testing.assert_close(alone, whole[:, :1])


def test_adapting_alone_updates_nothing():
    loop = InnerLoop(network(), F.cross_entropy, steps=STEPS)
    loop.predict(loop.adapt(batch()), batch()[0])
    loop.curve(batch(), batch(), steps=STEPS + 3)
    torch.testing.assert_close(loop.model.state_dict(), network().state_dict(), rtol=0, atol=0)


def test_outside_of_a_loop_it_is_the_norm_it_replaced():
    own, expected, x = network(), plain_network(), batch()[0][0]
    torch.testing.assert_close(own(x), expected(x))
    fresh = plain_network()  # whose running statistics a pass in training mode has not changed
    torch.testing.assert_close(own.eval()(x), fresh.eval()(x))
    half = own.float()(x.bfloat16().float())
    assert half.dtype == torch.float32


def test_state_dict_holds_the_statistics():
    loop, other = trained(), InnerLoop(network(), F.cross_entropy, steps=STEPS, learning_rate=RATE).eval()
    assert loop.state_dict()["model.1.running_mean"].shape == (STEPS + 1, 4)
    other.load_state_dict(loop.state_dict())
    torch.testing.assert_close(other(batch(), batch()), loop(batch(), batch()), rtol=0, atol=0)


def test_takes_over_the_norms():
    plain = plain_network()
    plain[1].running_mean += 1
    shared = nn.Module()
    shared.first = shared.second = plain[1]
    use_per_step_statistics(shared, 3)
    assert shared.first is shared.second
    assert shared.first.weight is plain[1].weight
    torch.testing.assert_close(shared.first.running_mean, torch.ones(4, 4, dtype=torch.float64))
    bare = use_per_step_statistics(nn.BatchNorm1d(2, affine=False, track_running_stats=False), 1)
    assert sorted(bare.state_dict()) == ["num_batches_tracked", "running_mean", "running_var"]
    assert repr(bare) == "PerStepBatchNorm(2, steps=1, eps=1e-05, momentum=0.1)"


def of_rank(rank):
    loop = InnerLoop(network(), F.cross_entropy, steps=STEPS)
    part = slice(0, 1) if rank == 0 else slice(1, 5)
    for seed in (0, 1):
        support, query = (tuple(tensor[part] for tensor in batch(seed=seed + more)) for more in (0, 5))
        loop(support, query)
    return {name: value for name, value in loop.state_dict().items() if "running" in name or "tracked" in name}


@pytest.mark.distributed
def test_two_unequal_ranks_have_the_statistics_of_one_process(tmp_path):
    loop = InnerLoop(network(), F.cross_entropy, steps=STEPS)
    for seed in (0, 1):
        loop(batch(seed=seed), batch(seed=seed + 5))
    expected = loop.state_dict()
    for state in run_on_ranks(of_rank, 2, tmp_path):
        assert len(state) == 6
        torch.testing.assert_close(state, {name: expected[name] for name in state})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: use_per_step_statistics(nn.Linear(1, 1), 2),
            ValueError,
            "must have batch norms, got a Linear",
        ),
        (lambda: use_per_step_statistics(plain_network(), 0), ValueError, "`steps` must be at least 1"),
        (lambda: PerStepBatchNorm(nn.SyncBatchNorm(2), 2), TypeError, "`norm` must be a BatchNorm.*got SyncBatchNorm"),
        (lambda: network()[1](torch.ones(2, 3)), ValueError, r"shape \(samples, 4, ...\), got \(2, 3\)"),
        (
            lambda: InnerLoop(network(), F.cross_entropy)(batch(), batch()),
            ValueError,
            "`steps` must in training be at most the 2 of `use_per_step_statistics`, got 3",
        ),
        (
            lambda: InnerLoop(nn.Sequential(nn.SyncBatchNorm(2)), F.cross_entropy)(batch(), batch()),
            ValueError,
            "SyncBatchNorm.*`sync_batchnorm=True`",
        ),
        (
            lambda: InnerLoop(network(), F.mse_loss, steps=2).with_features(batch(), batch(), "hed"),
            ValueError,
            "no module is called 'hed'",
        ),
        (
            lambda: InnerLoop(network(), F.mse_loss, steps=2).with_features(batch(), batch(), "*"),
            ValueError,
            "`layer` must name one module",
        ),
        (
            lambda: InnerLoop(network(), F.mse_loss, steps=2).with_features(batch(), batch(), 7),
            TypeError,
            "`layer` must be the name of a module, got int",
        ),
        (
            lambda: InnerLoop(network(), F.mse_loss, vectorize=Vectorization(chunk_size=2)).with_features(
                batch(), batch(), "0"
            ),
            ValueError,
            "`chunk_size` must be None where features are asked for, got 2",
        ),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
