"""The forms of an inner loop give one result: vectorised, looped, in chunks, with inputs of every kind."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins.meta import GAP, InnerLoop, Preconditioner, Vectorization

TASKS, SAMPLES = 3, 4


def regression(width: int = 6, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TASKS, SAMPLES, width, generator=generator, dtype=torch.float64)
    return x, x.sum(-1, keepdim=True).sin()


def mlp(width: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def gradient(loop: InnerLoop, extra: tuple[Tensor, ...] = (), batches: Any = None) -> tuple[Tensor, ...]:
    support, query = batches or (regression(), regression(seed=1))
    loss = loop(support, query).loss
    wanted = [*(parameter for parameter in loop.parameters() if parameter.requires_grad), *extra]
    return loss.detach(), *torch.autograd.grad(loss, wanted, materialize_grads=True)


# What a loss, a preconditioner or an input depends on beside the loop's own parameters.


class ClosedOver(Preconditioner):
    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = [scale]  # no parameter of this module

    def forward(self, gradients: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        return {name: self.scale[0] * gradient for name, gradient in gradients.items()}


def temperature_in_the_loss(free: Tensor) -> tuple[InnerLoop, Any]:
    return InnerLoop(mlp(), lambda o, y: F.mse_loss(o * free, y), steps=2, learning_rate=0.3), None


def derived_temperature(free: Tensor) -> tuple[InnerLoop, Any]:
    derived = free.exp().sqrt()  # a graph that all chunks share
    return InnerLoop(mlp(), lambda o, y: F.mse_loss(o * derived, y), steps=2, learning_rate=0.3), None


def preconditioner(free: Tensor) -> tuple[InnerLoop, Any]:
    return InnerLoop(mlp(), F.mse_loss, ClosedOver(free), steps=2, learning_rate=0.3), None


def derived_preconditioner(free: Tensor) -> tuple[InnerLoop, Any]:
    return InnerLoop(mlp(), F.mse_loss, ClosedOver(free.square()), steps=2, learning_rate=0.3), None


def model_with_a_hidden_tensor(free: Tensor) -> tuple[InnerLoop, Any]:
    network = mlp()
    network[0].register_forward_hook(lambda module, args, output: output * free)
    return InnerLoop(network, F.mse_loss, steps=2, learning_rate=0.3), None


def encoded_inputs(free: Tensor) -> tuple[InnerLoop, Any]:
    (x, y), query = regression(), regression(seed=1)
    return InnerLoop(mlp(), F.mse_loss, steps=2, learning_rate=0.3), ((x * free, y), query)


def inputs_and_loss(free: Tensor) -> tuple[InnerLoop, Any]:
    loop, _ = temperature_in_the_loss(free)
    (x, y), query = regression(), regression(seed=1)
    return loop, ((x, y), (query[0] * free.exp(), query[1]))


SOURCES = [
    temperature_in_the_loss, derived_temperature, preconditioner, derived_preconditioner, model_with_a_hidden_tensor,
    encoded_inputs, inputs_and_loss,
]  # fmt: skip


@pytest.mark.parametrize("make", SOURCES)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_chunks_find_all_that_is_learned(make: Callable[[Tensor], tuple[InnerLoop, Any]], size: int):
    found = []
    for chunk_size in (None, size):
        free = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        loop, batches = make(free)
        loop.chunk_size = chunk_size
        found.append(gradient(loop, (free,), batches))
    assert found[0][-1] != 0
    torch.testing.assert_close(found[1], found[0])


def test_the_loss_of_chunks_has_no_second_derivative_on_any_way():
    free = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    loop, _ = temperature_in_the_loss(free)
    loop.chunk_size = 1
    loss = loop(regression(), regression(seed=1)).loss
    (first,) = torch.autograd.grad(loss, free, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(first, free)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        first.backward()


# Layers whose vectorised gradient torch leaves out a part of.


class Looked(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.rows, self.out = nn.Embedding(5, 3, **settings), nn.Linear(6, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.rows(ids).tanh().flatten(1))


class Functional(Looked):
    def forward(self, ids: Tensor) -> Tensor:
        return self.out(F.embedding(ids, self.rows.weight, padding_idx=1, scale_grad_by_freq=True).flatten(1))


EMBEDDINGS: dict[str, Callable[[], nn.Module]] = {
    "plain": Looked,
    "padding": lambda: Looked(padding_idx=1),
    "padding from behind": lambda: Looked(padding_idx=-2),
    "frequency": lambda: Looked(scale_grad_by_freq=True),
    "both": lambda: Looked(padding_idx=0, scale_grad_by_freq=True),
    "norm": lambda: Looked(max_norm=0.5),
    "sparse": lambda: Looked(sparse=True),
    "functional": Functional,
}


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [0, 2])  # 0: the query pass alone
def test_embeddings(name: str, first_order: bool, steps: int):
    found = []
    generator = torch.Generator().manual_seed(3)
    ids, targets = torch.randint(5, (TASKS, SAMPLES, 2), generator=generator), regression()[1]
    for vectorize in (False, True):
        torch.manual_seed(0)
        model = EMBEDDINGS[name]().double()
        before = model.rows.weight.detach().clone()
        loop = InnerLoop(model, F.mse_loss, learning_rate=0.3, first_order=first_order, vectorize=vectorize)
        loss = loop((ids, targets), (ids.flip(1), targets), steps=steps).loss
        found.append(torch.autograd.grad(loss, list(model.parameters())))
        torch.testing.assert_close(model.rows.weight.detach(), before, rtol=0, atol=0)
    torch.testing.assert_close(found[1], found[0])
    if name.startswith("padding"):
        assert not found[1][0][1 if name == "padding" else 3].any()


@pytest.mark.parametrize("settings", [{"padding_idx": 1}, {"padding_idx": -1}, {"scale_grad_by_freq": True}, {}])
def test_the_first_derivative_of_an_embedding_is_that_of_torch(settings: dict[str, Any]):
    """A single inner step from which nothing else follows: the update is the gradient of torch."""
    torch.manual_seed(0)
    model, ids, targets = Looked(**settings).double(), torch.tensor([[0, 1], [1, 4], [1, 0], [2, 2]]), regression()[1]
    loop = InnerLoop(model, F.mse_loss, steps=1, learning_rate=1.0, vectorize=True)
    adapted = loop.adapt((ids.expand(TASKS, -1, -1), targets))["rows.weight"]
    for task in range(TASKS):
        (expected,) = torch.autograd.grad(F.mse_loss(model(ids), targets[task]), [model.rows.weight])
        torch.testing.assert_close(model.rows.weight - adapted[task], expected)


# Models that vmap cannot run, and what is told.


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cells, self.out = kind(2, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cells(x.unflatten(-1, (3, 2)))[0][:, -1])


class Branches(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


class OneHot(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + F.one_hot(x.argmax(-1)).sum())


def normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 1))


UNVECTORISED: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "spectral norm": lambda: normed(nn.utils.parametrizations.spectral_norm),
    "old spectral norm": lambda: normed(nn.utils.spectral_norm),
    "a branch": lambda: Branches(6, 1),
    "one hot": lambda: OneHot(6, 1),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return UNVECTORISED[name]().double()


@pytest.mark.parametrize("name", UNVECTORISED)
def test_falls_back_with_one_warning(name: str):
    expected = gradient(InnerLoop(made(name), F.mse_loss, vectorize=False))
    loop = InnerLoop(made(name), F.mse_loss)
    with pytest.warns(UserWarning, match="computed one after the other, since vectorising them failed") as record:
        found = gradient(loop)
    assert len([one for one in record if "vectorising" in str(one.message)]) == 1
    torch.testing.assert_close(found, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(regression(), regression(seed=1))


@pytest.mark.parametrize("name", ["LSTM", "a branch", "one hot"])
def test_a_failure_when_vectorised_tells_of_the_other_form(name: str):
    with pytest.raises(RuntimeError) as error:
        gradient(InnerLoop(made(name), F.mse_loss, vectorize=True))
    assert any("`vectorize=False`" in note for note in error.value.__notes__)


def test_a_mistake_of_the_loss_is_no_reason_to_fall_back():
    loop = InnerLoop(mlp(), F.mse_loss)
    loop(regression(), regression())
    loop.loss = lambda outputs, targets: outputs
    with pytest.raises(ValueError, match="must return a scalar"):
        loop(regression(), regression())


@pytest.mark.parametrize(("pixels", "looped"), [(8, False), (28, False), (84, True), (96, True)])
def test_large_images_are_looped_over_on_a_cpu(pixels: int, looped: bool):
    seen = []

    class Look(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch._C._functorch.is_batchedtensor(x))
            return super().forward(x).mean((2, 3))

    x = torch.randn(2, 2, 1, pixels, pixels)
    loop = InnerLoop(Look(1, 1, 3), F.mse_loss, steps=1, first_order=True)
    loop((x, torch.zeros(2, 2, 1)), (x, torch.zeros(2, 2, 1)))
    assert seen[-1] is not looped


@pytest.mark.parametrize(("value", "error"), [("Auto", ValueError), (1, TypeError), (None, TypeError)])
def test_other_values_are_refused(value: Any, error: type[Exception]):
    with pytest.raises(error, match='`vectorize` must be True, False or "auto"'):
        InnerLoop(mlp(), F.mse_loss, vectorize=value)


# The model is not changed, whatever it does to its buffers.


class Counts(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.scale = self.scale + 1  # another tensor in its place
        return super().forward(x)


BUFFERS = {"counter": Counts, "batch norm in evaluation": lambda: nn.Sequential(nn.BatchNorm1d(6).eval(), mlp())}
BUFFERS |= {name: UNVECTORISED[name] for name in ("spectral norm", "old spectral norm")}


@pytest.mark.parametrize("name", BUFFERS)
@pytest.mark.filterwarnings("ignore:.*one after the other")
@pytest.mark.parametrize("vectorize", [False, "auto"])
def test_buffers_stay(name: str, vectorize: Any):
    torch.manual_seed(0)
    model = BUFFERS[name]().double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loop = InnerLoop(model, F.mse_loss, vectorize=vectorize)
    for _ in range(2):
        loop(regression(), regression(seed=1)).loss.backward()
    loop.predict(loop.adapt(regression()), regression()[0])
    loop.curve(regression(), regression())
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


# Autocast.


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, nn.Identity])
def test_every_pass_takes_part_in_autocast_in_both_forms(first_order: bool, norm: type[nn.Module]):
    dtypes: list[torch.dtype] = []

    class Look(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            dtypes.append(x.dtype)
            return x

    losses = []
    for vectorize in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), Look(), norm(8), nn.Tanh(), nn.Linear(8, 1), Look())
        loop = InnerLoop(model, F.mse_loss, steps=2, first_order=first_order, vectorize=vectorize)
        batch = tuple(part.float() for part in regression())
        with torch.autocast("cpu", torch.bfloat16):
            episodes = loop(batch, batch)
            adapted = loop.predict(loop.adapt(batch), batch[0])
        episodes.loss.backward()
        assert episodes.outputs.dtype == adapted.dtype == torch.bfloat16
        losses.append(episodes.loss.float())
    assert set(dtypes) == {torch.bfloat16}
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=1e-2)


# Inputs.


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        return (self.first(x).tanh() * self.second(extra)).sum(-1, keepdim=True)


def two() -> nn.Module:
    torch.manual_seed(0)
    return Two().double()


@pytest.mark.parametrize("vectorize", [True, False, Vectorization(chunk_size=2)], ids=str)
@pytest.mark.parametrize("kind", ["tuple", "dict", "nested targets", "lists", "lists of dicts"])
def test_inputs_of_several_tensors(kind: str, vectorize: Any):
    """As one tensor that the model takes apart."""

    class Packed(Two):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, :6], x[:, 6:])

    def packed(batch: tuple[Tensor, Tensor]) -> Any:
        return torch.cat([batch[0], batch[0][..., :2]], -1), batch[1]

    def taken_apart(batch: tuple[Tensor, Tensor]) -> Any:
        x, y = batch
        inputs: Any = {"extra": x[..., :2], "x": x} if "dict" in kind else (x, x[..., :2])
        targets: Any = {"values": (y,)} if kind == "nested targets" else y
        if not kind.startswith("lists"):
            return inputs, targets
        if kind == "lists of dicts":
            return [{name: part[task] for name, part in inputs.items()} for task in range(TASKS)], list(targets)
        return [tuple(part[task] for part in inputs) for task in range(TASKS)], list(targets)

    def loss(outputs: Tensor, targets: Any) -> Tensor:
        return F.mse_loss(outputs, targets["values"][0] if isinstance(targets, dict) else targets)

    torch.manual_seed(0)
    batches = regression(), regression(seed=1)
    plain = InnerLoop(Packed().double(), F.mse_loss, steps=2, learning_rate=0.3)
    expected = gradient(plain, (), tuple(map(packed, batches)))
    loop = InnerLoop(two(), loss, steps=2, learning_rate=0.3, vectorize=vectorize)
    support, query = map(taken_apart, batches)
    torch.testing.assert_close(gradient(loop, (), (support, query)), expected)
    outputs = loop.predict(loop.adapt(support), query[0])
    torch.testing.assert_close(outputs, plain.predict(plain.adapt(packed(batches[0])), packed(batches[1])[0]))


@pytest.mark.parametrize("vectorize", [True, False, Vectorization(chunk_size=2)], ids=str)
def test_tasks_of_different_sizes(vectorize: Any):
    """The mean over tasks, each computed alone."""
    sizes, queries = (1, 3, 3, 2), (2, 2, 4, 1)
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for number, asked in zip(sizes, queries, strict=True):
        x = torch.randn(number + asked, 6, generator=generator, dtype=torch.float64)
        tasks.append(((x[:number], x[:number].sum(1, True)), (x[number:], x[number:].sum(1, True).sin())))
    loop = InnerLoop(mlp(), F.mse_loss, GAP(linear=True), steps=2, learning_rate=0.1, vectorize=vectorize)
    (support, query) = (tuple([task[side][part] for task in tasks] for part in (0, 1)) for side in (0, 1))
    found = gradient(loop, (), (support, query))
    single = [gradient(loop, (), tuple(tuple(part[None] for part in pair) for pair in task)) for task in tasks]
    torch.testing.assert_close(found, tuple(torch.stack(parts).mean(0) for parts in zip(*single, strict=True)))
    episodes = loop(support, query)
    assert [tuple(outputs.shape) for outputs in episodes.outputs] == [(asked, 1) for asked in queries]
    assert episodes.losses.shape == (4,)
    predicted = loop.predict(loop.adapt(support), query[0])
    torch.testing.assert_close(predicted, list(episodes.outputs))


def test_lists_that_are_no_tasks_are_named():
    x, y = regression()
    loop = InnerLoop(mlp(), F.mse_loss)
    with pytest.raises(ValueError, match="got 2 and 3; several inputs of the model are a tuple"):
        loop(([x, x], y), (x, y))
    with pytest.raises(ValueError, match="as many inputs as targets"):
        loop((list(x), [y[0][:2], *y[1:]]), (x, y))


# What carries a gradient, and what a loss and a preconditioner may ask for.


@pytest.mark.parametrize("vectorize", [True, False])
def test_losses_and_outputs_carry_their_gradient(vectorize: bool):
    loop = InnerLoop(mlp(), F.mse_loss, steps=2, learning_rate=0.3, vectorize=vectorize)
    episodes, query = loop(regression(), regression(seed=1)), regression(seed=1)
    wanted = list(loop.parameters())
    expected = torch.autograd.grad(episodes.loss, wanted, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(episodes.losses.mean(), wanted, retain_graph=True), expected)
    torch.testing.assert_close(torch.autograd.grad(F.mse_loss(episodes.outputs, query[1]), wanted), expected)


def proximal(outputs: Tensor, targets: Tensor, *, parameters: Any, initial: Any, step: int | None) -> Tensor:
    loss = F.mse_loss(outputs, targets)
    if step is None:  # the query loss
        return loss
    return loss + 0.5 * sum((parameters[name] - initial[name]).square().sum() for name in parameters)


class Proximal(Preconditioner):
    def forward(self, gradients: Any, step: int, parameters: Any, initial: Any) -> Any:
        return {name: gradient + parameters[name] - initial[name] for name, gradient in gradients.items()}


class Decay(Preconditioner):
    def forward(self, gradients: Any, step: int, parameters: Any) -> Any:
        return {name: gradient + 0.1 * parameters[name] for name, gradient in gradients.items()}


def decayed(outputs: Tensor, targets: Tensor, parameters: Any, step: int | None) -> Tensor:
    term = sum(parameter.square().sum() for parameter in parameters.values())
    return F.mse_loss(outputs, targets) + (0 if step is None else 0.05 * term)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(("loss", "other"), [(proximal, Proximal), (decayed, Decay)])
def test_a_term_of_the_loss_is_one_of_the_update(loss: Any, other: Any, first_order: bool, vectorize: bool):
    settings = {"steps": 3, "learning_rate": 0.2, "first_order": first_order, "vectorize": vectorize}
    by_loss = gradient(InnerLoop(mlp(), loss, **settings))
    by_update = gradient(InnerLoop(mlp(), F.mse_loss, other(), **settings))
    torch.testing.assert_close(by_loss[0], by_update[0])
    if not first_order:  # there the update's own term keeps its gradient
        torch.testing.assert_close(by_loss, by_update)
