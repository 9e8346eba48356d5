"""The inner loop of gradient-based meta-learning: adapt a model to every task, and know how that depends on it."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_choice, check_finite_number, check_non_negative_int, check_positive_int
from lightning_plugins.meta.batch_statistics import check_no_running_statistics
from lightning_plugins.meta.loop import arguments
from lightning_plugins.meta.loop.episode import Episode, Episodes, start
from lightning_plugins.meta.loop.measure import Loss, Parameters, check_used, outputs_of
from lightning_plugins.meta.loop.tasks import Draws, Task, chunk_by_chunk, eagerly, over_tasks
from lightning_plugins.meta.loop.tensors import check_batch, check_batches, ordinary_tensors
from lightning_plugins.meta.preconditioners import Preconditioner
from lightning_plugins.meta.running_statistics import Statistics
from lightning_plugins.selection import TensorRef

Rates = Literal["fixed", "learned", "learned_per_step"]
Randomness = Literal["different", "same"]


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
    would update them is refused (see `use_batch_statistics` and `use_per_step_statistics`). Works without gradients and
    in inference mode. Under float16 autocast the loop computes in float32: nothing scales the inner loss.

    Args:
        model: Any module that maps a tensor to a tensor. It becomes a submodule.
        loss: Maps outputs and targets of one task, ``(samples, ...)`` each, to a scalar.
        preconditioner: What is done to a gradient before it is followed; `Identity` (MAML) by default. A new one.
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
        adapted = arguments.adapted_parameters(model, layers)
        self.adapted, self.model = tuple(adapted), model
        self.preconditioner = arguments.initialised(preconditioner, adapted, steps)
        self.rates = arguments.learned_rates(adapted, rates, steps, learning_rate)
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
        return self._episodes(support, query, None, steps, step_weights)[0]

    def with_features(
        self,
        support: tuple[Tensor, Tensor],
        query: tuple[Tensor, Tensor],
        layer: str,
        *,
        steps: int | None = None,
        step_weights: Sequence[float] | None = None,
    ) -> tuple[Episodes, Tensor]:
        """Do what a call does, and return what a layer of the adapted models made of the query samples.

        For terms of a loss on representations: it carries its gradient for all that is learned, through all steps.

        Args:
            support: As for a call.
            query: As for a call.
            layer: Dotted name of a module in the model, ``"name:input"`` for what it receives.
            steps: As for a call.
            step_weights: As for a call.

        Returns:
            The episodes, and a tensor of shape ``(tasks, samples, ...)``.

        Raises:
            TypeError: As for a call, or if the layer gives no tensor.
            ValueError: As for a call, if the layer is unknown or not one, or if the loop has a ``chunk_size``, by which
                gradients are taken before the term on the features is known.
        """
        if self.chunk_size is not None:
            raise ValueError(f"`chunk_size` must be None where features are asked for, got {self.chunk_size}")
        episodes, features = self._episodes(
            support, query, arguments.check_layer(self.model, layer), steps, step_weights
        )
        return episodes, features[0]

    @eagerly
    @torch.no_grad()
    def curve(
        self, support: tuple[Tensor, Tensor], query: tuple[Tensor, Tensor], *, steps: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Measure on the query samples after every inner step: for evaluation, without a gradient.

        Args:
            support: As for a call.
            query: As for a call.
            steps: Number of inner steps.

        Returns:
            The losses, shape ``(tasks, steps + 1)``: the first without adaptation; and the outputs, shape
            ``(tasks, steps + 1, samples, ...)``.

        Raises:
            TypeError: As for a call.
            ValueError: As for a call.
        """
        steps = self._check_call(steps)
        statistics = Statistics(self.model, collect=False)

        def task(*batches: Tensor) -> tuple[Tensor, ...]:
            episode = Episode(self, batches[:2], statistics)
            measured = [episode.measure(batches[2:])]
            measured += [episode.take(1).measure(batches[2:]) for _ in range(steps)]
            losses, outputs = zip(*measured, strict=True)
            return torch.stack(losses), torch.stack(outputs)

        with ordinary_tensors(check_batches(support, query)) as tensors:
            self._check_used(tensors[:2])
            losses, outputs = self._over_tasks(task, tensors)
        return losses, outputs

    @eagerly
    def adapt(self, support: tuple[Tensor, Tensor], *, steps: int | None = None) -> Parameters:
        """Return the parameters adapted to every task, for `predict`.

        Args:
            support: Inputs and targets of shapes ``(tasks, samples, ...)``.
            steps: Number of inner steps.

        Returns:
            Every adapted parameter by dotted name, with a first dimension for the tasks. They carry their gradient, in
            memory whatever ``chunk_size``.

        Raises:
            TypeError: As for a call.
            ValueError: As for a call.
        """
        steps = self._check_call(steps)
        statistics = Statistics(self.model, collect=False)

        def task(*batch: Tensor) -> tuple[Tensor, ...]:
            return tuple(Episode(self, batch, statistics).take(steps).parameters.values())

        with ordinary_tensors(check_batch("support", support)) as tensors:
            self._check_used(tensors)
            return dict(zip(self.adapted, self._over_tasks(task, tensors), strict=True))

    @eagerly
    def predict(self, adapted: Mapping[str, Tensor], inputs: Tensor, *, steps: int | None = None) -> Tensor:
        """Return the outputs of adapted models.

        Args:
            adapted: What `adapt` returned.
            inputs: Shape ``(tasks, samples, ...)``.
            steps: How many inner steps `adapt` took, for norms with statistics of their own per step.

        Returns:
            Tensor of shape ``(tasks, samples, ...)``.

        Raises:
            TypeError: If the model does not return a tensor.
            ValueError: If ``adapted`` and ``inputs`` differ in the number of tasks or ``adapted`` lacks parameters, or
                the model has norms that would update running statistics.
        """
        arguments.check_adapted(adapted, self.adapted, inputs)
        row, statistics = self._check_call(steps), Statistics(self.model, collect=False)

        def task(inputs: Tensor, *parameters: Tensor) -> tuple[Tensor]:
            with statistics.of_step(row):
                return (outputs_of(self.model, dict(zip(self.adapted, parameters, strict=True)), inputs),)

        with ordinary_tensors((inputs, *(adapted[name] for name in self.adapted))) as tensors:
            return self._over_tasks(task, tensors)[0]

    def _over_tasks(self, task: Task, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return over_tasks(task, tensors, self.vectorize, self.chunk_size, self.same_draws)

    @eagerly
    def _episodes(
        self,
        support: tuple[Tensor, Tensor],
        query: tuple[Tensor, Tensor],
        layer: TensorRef | None,
        steps: int | None,
        step_weights: Sequence[float] | None,
    ) -> tuple[Episodes, Sequence[Tensor]]:
        steps = self._check_call(steps)
        weights = arguments.weights_of_steps(step_weights, steps)
        statistics = Statistics(self.model, collect=True)

        def task(*batches: Tensor) -> tuple[Tensor, ...]:
            episode = Episode(self, batches[:2], statistics)
            return *episode.run(batches[2:], steps, weights, layer), *episode.seen

        with ordinary_tensors(check_batches(support, query)) as tensors:
            self._check_used(tensors[:2])
            if self.chunk_size is None or not torch.is_grad_enabled():
                weighted, losses, outputs, *rest = self._over_tasks(task, tensors)
            else:
                weighted, losses, outputs, *rest = self._chunk_by_chunk(task, tensors, self.chunk_size)
            features = int(layer is not None)
            statistics.update(rest[features:])
            return Episodes(weighted.mean(), losses, outputs), rest[:features]

    def _chunk_by_chunk(self, task: Task, tensors: Sequence[Tensor], size: int) -> tuple[Tensor, ...]:
        sources = [tensor for tensor in (*self.parameters(), *tensors) if tensor.requires_grad]
        draws = Draws(tensors[0].device) if self.same_draws else None
        return chunk_by_chunk(partial(self._over_tasks, task), tensors, size, sources, draws)

    def _check_call(self, steps: int | None) -> int:
        check_no_running_statistics(self.model)
        return self.steps if steps is None else check_non_negative_int("steps", steps)

    def _check_used(self, support: Sequence[Tensor]) -> None:
        if not self._checked:  # once: a forward and a backward pass of one task
            check_used(self.model, self.loss, start(self), support)
        self._checked = True
