"""The inner steps of one task; under ``vmap``, of all tasks at once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple, Protocol

from torch import Tensor, nn
from torch.func import grad

from lightning_plugins.meta.loop.arguments import check_updates
from lightning_plugins.meta.loop.measure import Loss, Parameters, measure, plain_gradient
from lightning_plugins.meta.loop.norms import PlainNorms
from lightning_plugins.meta.preconditioners import Preconditioner, key
from lightning_plugins.meta.running_statistics import Statistics
from lightning_plugins.selection import TensorRef


class Episodes(NamedTuple):
    """What became of a batch of tasks.

    Attributes:
        loss: Mean over tasks of the query loss, with its gradient: a scalar.
        losses: Query loss of every task after the last inner step, detached: shape ``(tasks,)``.
        outputs: The adapted models' outputs on the query inputs, detached: shape ``(tasks, samples, ...)``.
    """

    loss: Tensor
    losses: Tensor
    outputs: Tensor


class Loop(Protocol):
    """What the steps need of an inner loop."""

    model: nn.Module
    loss: Loss
    preconditioner: Preconditioner
    adapted: tuple[str, ...]
    learning_rate: float
    rates: nn.ParameterDict
    per_step: bool
    first_order: bool
    vectorize: bool


class Episode:
    """One task's parameters, step after step, and what the norms saw on the way."""

    def __init__(self, loop: Loop, support: Sequence[Tensor], statistics: Statistics) -> None:
        self.loop, self.support, self.statistics = loop, support, statistics
        self.parameters = start(loop)
        self.taken = 0
        self.seen: list[Tensor] = []
        statistics.begin_task()

    def step(self) -> None:
        """Follow the gradient of the support loss once."""
        loop, rest, followed = self.loop, Parameters(), self.parameters
        if loop.first_order:  # nothing then asks for the graph of the inner gradient
            rest = {name: parameter.detach() for name, parameter in loop.model.named_parameters()}
            followed = {name: parameter.detach() for name, parameter in followed.items()}

        def value(current: Parameters) -> tuple[Tensor, tuple[Tensor, ...]]:
            with self.statistics.of_step(self.taken) as seen:
                return measure(loop.model, loop.loss, {**rest, **current}, self.support)[0], tuple(seen)

        with nullcontext() if loop.first_order else PlainNorms(loop.vectorize):
            if loop.vectorize:
                gradients, seen = grad(value, has_aux=True)(followed)
            else:
                gradients, seen = plain_gradient(value, followed, differentiable=not loop.first_order)
        self.seen.extend(tensor.detach() for tensor in seen)
        updates = check_updates(loop.preconditioner(gradients, self.taken), gradients)
        self.parameters = {
            name: parameter - self._rate(name) * updates[name] for name, parameter in self.parameters.items()
        }
        self.taken += 1

    def run(
        self, query: Sequence[Tensor], steps: int, weights: Sequence[float], layer: TensorRef | None
    ) -> tuple[Tensor, ...]:
        """The weighted query loss, that after the last step, the outputs, and the features if a layer is given."""
        earlier: Tensor | float = 0.0
        for step in range(steps):
            self.step()
            if step < steps - 1 and weights[step] != 0:
                earlier = earlier + weights[step] * self.measure(query)[0]
        with kept_features(layer) as features:
            loss, outputs = self.measure(query)
        return earlier + weights[-1] * loss, loss.detach(), outputs.detach(), *features

    def take(self, steps: int) -> "Episode":
        """Take several steps."""
        for _ in range(steps):
            self.step()
        return self

    def measure(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The loss and the outputs with the present parameters."""
        with self.statistics.of_step(self.taken) as seen:
            measured = measure(self.loop.model, self.loop.loss, self.parameters, batch)
        self.seen.extend(tensor.detach() for tensor in seen)
        return measured

    def _rate(self, name: str) -> Tensor | float:
        if not self.loop.rates:
            return self.loop.learning_rate
        rate: Tensor = self.loop.rates[key(name)]
        return rate[min(self.taken, len(rate) - 1)] if self.loop.per_step else rate


def start(loop: Loop) -> Parameters:
    """The adapted parameters before the first step."""
    own = dict(loop.model.named_parameters())
    return {name: own[name] for name in loop.adapted}


@contextmanager
def kept_features(reference: TensorRef | None) -> Iterator[list[Tensor]]:
    """Give what a layer returns, or receives, in this context, if there is one: the last tensor stays."""
    kept: list[Tensor] = []
    if reference is None:
        yield kept
        return

    def keep(module: nn.Module, args: tuple[object, ...], output: object = None) -> None:
        value = args[0] if reference.side == "input" and args else output
        if not isinstance(value, Tensor):
            raise TypeError(f"`layer`: {reference.label!r} must give a tensor, got {type(value).__name__}")
        kept[:] = [value]

    if reference.side == "input":
        handle = reference.module.register_forward_pre_hook(keep)
    else:
        handle = reference.module.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()
    if not kept:
        raise ValueError(f"`layer`: {reference.label!r} was not called; name one that every forward pass calls")
