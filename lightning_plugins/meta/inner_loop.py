"""The inner loop of gradient-based meta-learning: adapt a model to every task, and know how that depends on it."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.func import grad

from lightning_plugins._checks import check_choice, check_finite_number, check_non_negative_int, check_positive_int
from lightning_plugins.meta._arguments import adapted_parameters, check_updates, initialised, weights_of_steps
from lightning_plugins.meta._measure import Loss, Parameters, check_used, measure, outputs_of
from lightning_plugins.meta._norms import PlainNorms
from lightning_plugins.meta._tasks import (
    Draws,
    Task,
    add_gradients,
    check_batch,
    chunks,
    ordinary_tensors,
    over_tasks,
    with_known_gradient,
)
from lightning_plugins.meta.batch_statistics import check_no_running_statistics
from lightning_plugins.meta.preconditioners import Preconditioner, few, key

Rates = Literal["fixed", "learned", "learned_per_step"]
Randomness = Literal["different", "same"]


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


class InnerLoop(nn.Module):
    """Adapts a model to every task of a batch by gradient steps on its support samples.

    Each step subtracts ``learning_rate * preconditioner(gradient)`` from the adapted parameters. The loss on the query
    samples is differentiable with respect to what is learned over tasks, through all steps: the initial parameters,
    the preconditioner's and learned rates. The model itself is never changed.

    Tasks are vectorised, looped over, or vectorised in chunks: the same loss and the same gradients. In chunks the
    gradient of a chunk is taken before the next one starts, which bounds the memory by one chunk. Dropout draws from
    the global random generators, so `torch.manual_seed` repeats it; a chunked or looped run draws in another order
    than a vectorised one unless ``randomness="same"``.

    Norms use the statistics of the batch at hand, or in evaluation mode the running statistics they have; a norm that
    would update them is refused (see `use_batch_statistics`). Works without gradients and in inference mode.

    Args:
        model: Any module that maps a tensor to a tensor. It becomes a submodule.
        loss: Maps outputs and targets of one task, ``(samples, ...)`` each, to a scalar.
        preconditioner: What is done to a gradient before it is followed; `Identity` (MAML) by default. It must not have
            been in another loop.
        steps: Number of inner steps, unless a call says otherwise.
        learning_rate: Of the inner steps; what learned rates start from.
        rates: ``"fixed"``, or ``"learned"`` for one learned rate per adapted tensor, ``"learned_per_step"`` for one
            per tensor and step; steps beyond ``steps`` use the last step's.
        first_order: Whether to take the inner gradients for constants in the gradient over tasks.
        layers: Which layers adapt: names or globs, as in `lightning_plugins.selection`. None takes all. The head alone
            is ANIL, all but the head BOIL. Parameters that require no gradient do not adapt.
        vectorize: Whether to use ``torch.func.vmap``; else the tasks run one after the other.
        chunk_size: Number of tasks whose graph is in memory at a time; None for all.
        randomness: Whether dropout draws ``"different"`` or the ``"same"`` masks for the tasks.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of its range, a choice or a layer unknown, or nothing would adapt.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> loop = InnerLoop(model, nn.functional.mse_loss, steps=1, learning_rate=0.25)
        >>> x = torch.ones(2, 3, 1)  # two tasks of three samples
        >>> y = torch.stack([torch.full((3, 1), 2.0), torch.full((3, 1), -2.0)])
        >>> episodes = loop((x, y), (x, y))
        >>> episodes.losses  # the first task's weight went from 0 to 1, the second's to -1
        tensor([1., 1.])
        >>> episodes.loss.backward()  # the gradient for the weight from which both started
        >>> loop.adapt((x, y))["weight"].flatten()
        tensor([ 1., -1.], grad_fn=<ViewBackward0>)

    Source:
        Finn, Abbeel and Levine, ICML 2017, https://arxiv.org/abs/1703.03400.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        preconditioner: Preconditioner | None = None,
        *,
        steps: int = 5,
        learning_rate: float = 0.01,
        rates: Rates = "fixed",
        first_order: bool = False,
        layers: str | Sequence[str] | None = None,
        vectorize: bool = True,
        chunk_size: int | None = None,
        randomness: Randomness = "different",
    ) -> None:
        super().__init__()
        if not callable(loss):
            raise TypeError(f"`loss` must be a function of outputs and targets, got {type(loss).__name__}")
        self.steps = check_positive_int("steps", steps)
        self.learning_rate = check_finite_number("learning_rate", learning_rate)
        self.per_step = check_choice("rates", rates, get_args(Rates)) == "learned_per_step"
        self.chunk_size = None if chunk_size is None else check_positive_int("chunk_size", chunk_size)
        self.same_draws = check_choice("randomness", randomness, get_args(Randomness)) == "same"
        self.first_order, self.vectorize, self.loss = first_order, vectorize, loss
        adapted = adapted_parameters(model, layers)
        self.adapted = tuple(adapted)
        self.model = model
        self.preconditioner = initialised(preconditioner, adapted, steps)
        self.rates = nn.ParameterDict()
        if rates != "fixed":
            shape = (steps,) if self.per_step else ()
            for name, parameter in adapted.items():
                self.rates[key(name)] = nn.Parameter(parameter.detach().new_full(shape, float(learning_rate)))
        self._checked = False

    def forward(
        self,
        support: tuple[Tensor, Tensor],
        query: tuple[Tensor, Tensor],
        *,
        steps: int | None = None,
        step_weights: Sequence[float] | None = None,
    ) -> Episodes:
        """Adapt to the support samples of every task, and measure on its query samples.

        Args:
            support: Inputs and targets of shapes ``(tasks, samples, ...)``.
            query: Likewise, of as many tasks.
            steps: Number of inner steps; 0 measures the model as it is.
            step_weights: One number per step, the weight of the query loss after it; by default only that after the
                last step counts, with weight 1.

        Returns:
            The differentiable loss, the losses of the tasks, and the outputs.

        Raises:
            TypeError: If a batch is not a pair of tensors, or model or loss does not return a tensor.
            ValueError: If shapes or weights do not fit, the loss is not a scalar, the model has norms that would update
                running statistics, or an adapted parameter has no part in the support loss.
        """
        steps = self._check_call(steps)
        weights = weights_of_steps(step_weights, steps)
        tensors = (*check_batch("support", support), *check_batch("query", query))
        if len(tensors[0]) != len(tensors[2]):
            raise ValueError(f"`query` must have as many tasks as `support`, {len(tensors[0])}, got {len(tensors[2])}")

        def task(*batches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self._episode(batches[:2], batches[2:], steps, weights)

        with ordinary_tensors(tensors) as ordinary:
            self._check_used(ordinary[:2])
            if self.chunk_size is None or not torch.is_grad_enabled():
                weighted, losses, outputs = self._over_tasks(task, ordinary)
                return Episodes(weighted.mean(), losses, outputs)
            return self._chunk_by_chunk(task, ordinary, self.chunk_size)

    def adapt(self, support: tuple[Tensor, Tensor], *, steps: int | None = None) -> Parameters:
        """Return the parameters adapted to every task, for `predict`.

        Args:
            support: Inputs and targets of shapes ``(tasks, samples, ...)``.
            steps: Number of inner steps.

        Returns:
            Every adapted parameter by dotted name, with a first dimension for the tasks. They carry their gradient, for
            which ``chunk_size`` does not bound the memory.

        Raises:
            TypeError: As for a call.
            ValueError: As for a call.
        """
        steps = self._check_call(steps)

        def task(*batch: Tensor) -> tuple[Tensor, ...]:
            parameters = self._start()
            for step in range(steps):
                parameters = self._updated(parameters, batch, step)
            return tuple(parameters.values())

        with ordinary_tensors(check_batch("support", support)) as tensors:
            self._check_used(tensors)
            return dict(zip(self.adapted, self._over_tasks(task, tensors), strict=True))

    def predict(self, adapted: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """Return the outputs of adapted models.

        Args:
            adapted: What `adapt` returned.
            inputs: Shape ``(tasks, samples, ...)``.

        Returns:
            Tensor of shape ``(tasks, samples, ...)``.

        Raises:
            TypeError: If the model does not return a tensor.
            ValueError: If ``adapted`` and ``inputs`` differ in the number of tasks or ``adapted`` lacks parameters, or
                the model has norms that would update running statistics.
        """
        if missing := [name for name in self.adapted if name not in adapted]:
            raise ValueError(f"`adapted` must be what `adapt` returned, got no {few(missing)}")
        if any(len(adapted[name]) != len(inputs) for name in self.adapted):
            raise ValueError(
                f"`inputs` must have the {len(adapted[self.adapted[0]])} tasks of `adapted`, got {tuple(inputs.shape)}"
            )
        check_no_running_statistics(self.model)

        def task(inputs: Tensor, *parameters: Tensor) -> tuple[Tensor]:
            return (outputs_of(self.model, dict(zip(self.adapted, parameters, strict=True)), inputs),)

        with ordinary_tensors((inputs, *(adapted[name] for name in self.adapted))) as tensors:
            return self._over_tasks(task, tensors)[0]

    def _over_tasks(self, task: Task, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return over_tasks(
            task, tensors, vectorize=self.vectorize, chunk_size=self.chunk_size, same_draws=self.same_draws
        )

    def _chunk_by_chunk(self, task: Task, tensors: Sequence[Tensor], size: int) -> Episodes:
        """The gradient of each chunk before the next one, so that one graph is in memory at a time."""
        learned = [parameter for parameter in self.parameters() if parameter.requires_grad]
        sources = [*learned, *(tensor for tensor in tensors if tensor.requires_grad)]
        gradients: list[Tensor | None] = [None] * len(sources)
        draws = Draws(tensors[0].device)

        def measured(piece: Sequence[Tensor]) -> tuple[Tensor, ...]:
            """In a function, at whose end nothing holds the graph any more."""
            if self.same_draws:
                draws.restore()
            weighted, losses, outputs = self._over_tasks(task, piece)
            value = weighted.sum() / len(tensors[0])
            add_gradients(gradients, value, sources)
            return value.detach()[None], losses, outputs

        pieces = [measured(piece) for piece in chunks(tensors, size)]
        values, losses, outputs = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return Episodes(with_known_gradient(values.sum(), gradients, sources), losses, outputs)

    def _episode(
        self, support: Sequence[Tensor], query: Sequence[Tensor], steps: int, weights: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One task: the weighted query loss, that after the last step, and the outputs."""
        parameters = self._start()
        earlier: Tensor | float = 0.0
        for step in range(steps):
            parameters = self._updated(parameters, support, step)
            if step < steps - 1 and weights[step] != 0:
                earlier = earlier + weights[step] * self._measure(parameters, query)[0]
        loss, outputs = self._measure(parameters, query)
        return earlier + weights[-1] * loss, loss.detach(), outputs.detach()

    def _start(self) -> Parameters:
        own = dict(self.model.named_parameters())
        return {name: own[name] for name in self.adapted}

    def _updated(self, parameters: Parameters, support: Sequence[Tensor], step: int) -> Parameters:
        """The parameters after one inner step."""
        rest, followed = Parameters(), parameters
        if self.first_order:  # nothing then asks for the graph of the inner gradient
            rest = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
            followed = {name: parameter.detach() for name, parameter in parameters.items()}
        with PlainNorms() if self.vectorize and not self.first_order else nullcontext():
            gradients = grad(lambda current: self._measure({**rest, **current}, support)[0])(followed)
        updates = check_updates(self.preconditioner(gradients, step), gradients)
        return {name: parameter - self._rate(name, step) * updates[name] for name, parameter in parameters.items()}

    def _rate(self, name: str, step: int) -> Tensor | float:
        if not self.rates:
            return self.learning_rate
        rate: Tensor = self.rates[key(name)]
        return rate[min(step, len(rate) - 1)] if self.per_step else rate

    def _measure(self, parameters: Parameters, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return measure(self.model, self.loss, parameters, batch)

    def _check_call(self, steps: int | None) -> int:
        check_no_running_statistics(self.model)
        return self.steps if steps is None else check_non_negative_int("steps", steps)

    def _check_used(self, support: Sequence[Tensor]) -> None:
        if not self._checked:  # once: a forward and a backward pass of one task
            check_used(self.model, self.loss, self._start(), support)
            self._checked = True
