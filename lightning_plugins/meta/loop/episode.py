"""The inner steps of one task; under ``vmap``, of all tasks at once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.func import grad

from lightning_plugins.meta.loop.arguments import check_updates
from lightning_plugins.meta.loop.measure import Given, Loss, Measure, Parameters, named_arguments, plain_gradient
from lightning_plugins.meta.loop.replacements import replaced, with_autocast
from lightning_plugins.meta.preconditioners import Preconditioner, key
from lightning_plugins.meta.running_statistics import Statistics
from lightning_plugins.selection import TensorRef


class Episodes(NamedTuple):
    """Results of a batch of tasks.

    All have gradients with respect to the quantities learned across tasks, unless the loop has a ``chunk_size``: then
    only the loss does. Detach results that are kept for longer than a step.

    Attributes:
        loss: Mean query loss over tasks, weighted over steps: a scalar.
        losses: Query loss of every task after the last inner step: shape ``(tasks,)``.
        outputs: The adapted models' outputs on the query inputs: shape ``(tasks, samples, ...)``, or a list of tensors
            of shape ``(samples, ...)`` if tasks differ in their number of query samples.
    """

    loss: Tensor
    losses: Tensor
    outputs: Any


class Loop(Protocol):
    """Settings of an inner loop used in its steps."""

    model: nn.Module
    loss: Loss
    preconditioner: Preconditioner
    adapted: tuple[str, ...]
    learning_rate: float
    rates: nn.ParameterDict
    per_step: bool
    first_order: bool


class Episode:
    """One task's parameters over the steps, and the statistics of the norms."""

    def __init__(self, loop: Loop, support: Sequence[Any], statistics: Statistics, vectorize: bool) -> None:
        self.loop, self.support, self.statistics, self.vectorize = loop, support, statistics, vectorize
        self.measured = Measure(loop.model, loop.loss)
        self.parameters = self.initial = start(loop)
        self.device = next(iter(self.initial.values())).device
        self.taken = 0
        self.seen: list[Tensor] = []
        statistics.begin_task()

    def step(self) -> None:
        """Take one gradient step on the support loss."""
        loop, rest, followed, initial = self.loop, Parameters(), self.parameters, self.initial
        if loop.first_order:  # the graph of the inner gradient is not needed then
            rest = {name: parameter.detach() for name, parameter in loop.model.named_parameters()}
            followed, initial = _detached(followed), _detached(initial)

        def value(current: Parameters) -> tuple[Tensor, tuple[Tensor, ...]]:
            given = Given(current, initial, self.taken)._asdict()
            with self.statistics.of_step(self.taken) as seen:
                return self.measured({**rest, **current}, self.support, given)[0], tuple(seen)

        with replaced(self.vectorize, self.device, twice=not loop.first_order):
            if self.vectorize:
                gradients, seen = grad(value, has_aux=True)(followed)
            else:
                gradients, seen = plain_gradient(value, followed, differentiable=not loop.first_order)
        self.seen.extend(tensor.detach() for tensor in seen)
        updates = check_updates(self._preconditioned(gradients), gradients)
        self.parameters = {
            name: parameter - self._rate(name) * updates[name] for name, parameter in self.parameters.items()
        }
        self.taken += 1

    def run(
        self, query: Sequence[Any], steps: int, weights: Sequence[float], layer: TensorRef | None
    ) -> tuple[Tensor, ...]:
        """The weighted query loss, the loss after the last step, the outputs, and the features if a layer is given."""
        earlier: Tensor | float = 0.0
        for step in range(steps):
            self.step()
            if step < steps - 1 and weights[step] != 0:
                earlier = earlier + weights[step] * self.measure(query)[0]
        loss, *rest = self.measure(query, layer)
        return earlier + weights[-1] * loss, loss, *rest

    def take(self, steps: int) -> "Episode":
        """Take several steps."""
        for _ in range(steps):
            self.step()
        return self

    def measure(self, batch: Sequence[Any], layer: TensorRef | None = None) -> tuple[Tensor, ...]:
        """The loss, the outputs and, if requested, the features with the current parameters."""
        given = Given(self.parameters, self.initial, None)._asdict()

        def measured() -> tuple[tuple[Tensor, ...], ...]:
            with (
                self.statistics.of_step(self.taken) as seen,
                replaced(self.vectorize, self.device),
                kept_features(layer) as kept,
            ):
                results = self.measured(self.parameters, batch, given)
            return (*results, *kept), tuple(seen)

        results, seen = with_autocast(measured) if self.vectorize else measured()
        self.seen.extend(tensor.detach() for tensor in seen)
        return results

    def _preconditioned(self, gradients: Parameters) -> Parameters:
        given = Given(self.parameters, self.initial, None)._asdict()
        names = named_arguments(self.loop.preconditioner, ("parameters", "initial"))
        updates: Parameters = self.loop.preconditioner(gradients, self.taken, **{name: given[name] for name in names})
        return updates

    def _rate(self, name: str) -> Tensor | float:
        if not self.loop.rates:
            return self.loop.learning_rate
        rate: Tensor = self.loop.rates[key(name)]
        return rate[min(self.taken, len(rate) - 1)] if self.loop.per_step else rate


def _detached(parameters: Parameters) -> Parameters:
    return {name: parameter.detach() for name, parameter in parameters.items()}


def start(loop: Loop) -> Parameters:
    """The adapted parameters before the first step."""
    own = dict(loop.model.named_parameters())
    return {name: own[name] for name in loop.adapted}


@contextmanager
def kept_features(reference: TensorRef | None) -> Iterator[list[Tensor]]:
    """Capture the last output, or input, of a layer in this context, if one is given."""
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
