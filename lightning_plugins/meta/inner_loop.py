"""The differentiable inner loop of gradient-based meta-learning."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_choice, check_finite_number, check_non_negative_int, check_positive_int
from lightning_plugins._grouping import Group, grouped
from lightning_plugins.meta.batch_statistics import check_no_running_statistics
from lightning_plugins.meta.loop import arguments
from lightning_plugins.meta.loop.episode import Episode, Episodes, start
from lightning_plugins.meta.loop.form import Form, Plan, Vectorization, Vectorize, as_vectorization
from lightning_plugins.meta.loop.measure import Loss, Measure, Parameters, check_used
from lightning_plugins.meta.loop.replacements import replaced, with_autocast, without_fast_path
from lightning_plugins.meta.loop.structure import Nested, TaskBatch, batch_of
from lightning_plugins.meta.loop.tasks import eagerly
from lightning_plugins.meta.loop.tensors import check_batch, check_batches, ordinary_tensors
from lightning_plugins.meta.preconditioners import Preconditioner
from lightning_plugins.meta.running_statistics import Statistics
from lightning_plugins.selection import TensorRef

Rates = Literal["fixed", "learned", "learned_per_step"]
Part = Nested | list[Any]


class InnerLoop(nn.Module):
    """Adapts a model to every task of a batch by gradient steps on its support samples.

    Each step subtracts ``learning_rate * preconditioner(gradient)`` from the adapted parameters. The loss on the query
    samples is differentiable through all steps with respect to everything learned across tasks: the initial parameters,
    those of the preconditioner and learned rates. The model's parameters and buffers are never changed.

    Inputs and targets are tensors of shapes ``(tasks, samples, ...)``, or tuples of them, passed to the model as
    arguments, or mappings, passed as keyword arguments. Tasks of different sizes are lists with one entry of shape
    ``(samples, ...)`` per task.

    Tasks are vectorised, looped over, or vectorised in chunks, with the same loss and gradients. With chunks the
    gradient of a chunk is computed before the next one starts, which bounds the memory by that of one chunk. Dropout
    uses the global random generators and is reproducible with `torch.manual_seed`; a chunked or looped run draws in
    another order than a vectorised one unless they draw the same (`Vectorization`).

    Second-order inner steps compute attention with elementary operations: fused kernels have no second derivative.
    Norms use the statistics of the current batch, or in evaluation mode their running statistics; a norm that would
    update them raises an error (see `use_batch_statistics` and `use_per_step_statistics`). The loop works without
    gradients and in inference mode. Under float16 autocast it computes in float32, since the inner loss is not scaled.

    Args:
        model: Any module that maps inputs to a tensor. It becomes a submodule.
        loss: Maps outputs and targets of one task, ``(samples, ...)`` each, to a scalar. If it has arguments of these
            names it also gets ``parameters`` and ``initial``, the adapted parameters at this step and before the first
            by dotted name, and ``step``, which is None for the query loss: for a proximal term or a weight decay.
        preconditioner: Transforms gradients; `Identity` (MAML) by default. Must be a new instance.
        steps: Default number of inner steps.
        learning_rate: Learning rate of the inner steps, and initial value of learned rates.
        rates: ``"fixed"``, or ``"learned"`` for one learned rate per adapted tensor, ``"learned_per_step"`` for one
            per tensor and step; steps beyond ``steps`` use the last step's.
        first_order: Whether to treat the inner gradients as constants in the outer gradient.
        layers: Layers to adapt: names or globs, as in `lightning_plugins.selection`. None for all. Only the head is
            ANIL, all but the head BOIL. Parameters that require no gradient are not adapted.
        vectorize: Whether the tasks are vectorised (True), run one after the other (False), or as is faster
            (``"auto"``); or a `Vectorization`, which also limits how many are in memory at a time.

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
        >>> episodes.losses.detach()  # the first task's weight went from 0 to 1, the second's to -1
        tensor([1., 1.])
        >>> episodes.loss.backward()  # the gradient for the weight from which both started
        >>> loop.adapt((x, y))["weight"].flatten()
        tensor([ 1., -1.], grad_fn=<ViewBackward0>)

    Source:
        Finn, Abbeel and Levine, ICML 2017, https://arxiv.org/abs/1703.03400.
    """

    @grouped(vectorize=Group(Vectorization, main="mode"))
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
        vectorize: Vectorize | Vectorization = "auto",
    ) -> None:
        super().__init__()
        if not callable(loss):
            raise TypeError(f"`loss` must be a function of outputs and targets, got {type(loss).__name__}")
        self.steps = check_positive_int("steps", steps)
        self.learning_rate = check_finite_number("learning_rate", learning_rate)
        self.per_step = check_choice("rates", rates, get_args(Rates)) == "learned_per_step"
        self.first_order, order = arguments.check_first_order(first_order), as_vectorization(vectorize)
        self.vectorize, self.chunk_size = order.mode, order.chunk_size
        self.same_draws = order.randomness == "same"
        self.loss = loss
        adapted = arguments.adapted_parameters(model, layers)
        self.adapted, self.model = tuple(adapted), model
        self.preconditioner = arguments.initialised(preconditioner, adapted, steps)
        self.rates = arguments.learned_rates(adapted, rates, steps, learning_rate)
        self._form, self._checked = Form(), False

    def forward(
        self,
        support: tuple[Part, Part],
        query: tuple[Part, Part],
        *,
        steps: int | None = None,
        step_weights: Sequence[float] | None = None,
    ) -> Episodes:
        """Adapt to the support samples of every task, and evaluate on its query samples.

        Args:
            support: Inputs and targets of shapes ``(tasks, samples, ...)``; see the class for other forms.
            query: Likewise, for the same tasks.
            steps: Number of inner steps; 0 evaluates the unadapted model.
            step_weights: One number per step, the weight of the query loss after it; by default only the loss after the
                last step counts, with weight 1.

        Returns:
            The differentiable loss, the losses of the tasks, and the outputs.

        Raises:
            TypeError: If a batch is not a pair of tensors, or model or loss does not return a tensor.
            ValueError: If shapes or weights do not fit, the loss is not a scalar, the model has norms that would update
                running statistics, or the support loss does not depend on an adapted parameter.
        """
        return self._episodes(support, query, None, steps, step_weights)[0]

    def with_features(
        self,
        support: tuple[Part, Part],
        query: tuple[Part, Part],
        layer: str,
        *,
        steps: int | None = None,
        step_weights: Sequence[float] | None = None,
    ) -> tuple[Episodes, Tensor]:
        """Like a call, but also return a layer's outputs of the adapted models on the query, with gradients.

        Args:
            support: As for a call.
            query: As for a call.
            layer: Dotted name of a module in the model, ``"name:input"`` for its input.
            steps: As for a call.
            step_weights: As for a call.

        Returns:
            The episodes, and a tensor of shape ``(tasks, samples, ...)``.

        Raises:
            TypeError: As for a call, or if the layer returns no tensor.
            ValueError: As for a call, if the layer is unknown or several match, or if the loop has a ``chunk_size``,
                with which gradients are computed before the term on the features is known.
        """
        if self.chunk_size is not None:
            raise ValueError(f"`chunk_size` must be None where features are asked for, got {self.chunk_size}")
        reference = arguments.check_layer(self.model, layer)
        episodes, features = self._episodes(support, query, reference, steps, step_weights)
        return episodes, features[0]

    @eagerly
    @torch.no_grad()
    def curve(
        self, support: tuple[Part, Part], query: tuple[Part, Part], *, steps: int | None = None
    ) -> tuple[Any, ...]:
        """Evaluate on the query samples after every inner step, without gradients.

        Args:
            support: As for a call.
            query: As for a call.
            steps: Number of inner steps.

        Returns:
            The losses, shape ``(tasks, steps + 1)``, the first without adaptation, and the outputs, shape
            ``(tasks, steps + 1, samples, ...)``.

        Raises:
            TypeError, ValueError: As for a call.
        """
        steps, batch = self._check_call(steps), check_batches(support, query)
        statistics = Statistics(self.model, collect=False)

        def task(vectorize: bool, *parts: Any) -> tuple[Tensor, ...]:
            episode = Episode(self, parts[:2], statistics, vectorize)
            measured = [episode.measure(parts[2:])]
            measured += [episode.take(1).measure(parts[2:]) for _ in range(steps)]
            losses, outputs = zip(*measured, strict=True)
            return torch.stack(losses), torch.stack(outputs)

        return self._run(task, batch)

    @eagerly
    def adapt(self, support: tuple[Part, Part], *, steps: int | None = None) -> Parameters:
        """Return the adapted parameters of every task, for `predict`.

        Args:
            support: As for a call.
            steps: Number of inner steps.

        Returns:
            The adapted parameters by dotted name, with a first dimension for the tasks, and with gradients.

        Raises:
            TypeError, ValueError: As for a call.
        """
        steps, batch = self._check_call(steps), check_batch(support)
        statistics = Statistics(self.model, collect=False)

        def task(vectorize: bool, *parts: Any) -> tuple[Tensor, ...]:
            return tuple(Episode(self, parts, statistics, vectorize).take(steps).parameters.values())

        return dict(zip(self.adapted, self._run(task, batch), strict=True))

    @eagerly
    def predict(self, adapted: Mapping[str, Tensor], inputs: Part, *, steps: int | None = None) -> Any:
        """Return the outputs of adapted models.

        Args:
            adapted: What `adapt` returned.
            inputs: Shape ``(tasks, samples, ...)``.
            steps: Number of inner steps of `adapt`, for norms with per-step statistics.

        Returns:
            Tensor of shape ``(tasks, samples, ...)``.

        Raises:
            TypeError: If the model does not return a tensor.
            ValueError: If ``adapted`` and ``inputs`` differ in the number of tasks or ``adapted`` lacks parameters, or
                the model has norms that would update running statistics.
        """
        arguments.check_adapted(adapted, self.adapted, inputs)
        row, statistics = self._check_call(steps), Statistics(self.model, collect=False)
        measure = Measure(self.model, self.loss)

        def task(vectorize: bool, inputs: Any, *parameters: Tensor) -> tuple[Tensor]:
            own = dict(zip(self.adapted, parameters, strict=True))
            with statistics.of_step(row), replaced(vectorize, parameters[0].device):
                return (with_autocast(lambda: measure.outputs(own, inputs)),)

        batch = batch_of(inputs, *(adapted[name] for name in self.adapted))
        return self._run(task, batch, check=False)[0]

    @eagerly
    def _episodes(
        self,
        support: tuple[Part, Part],
        query: tuple[Part, Part],
        layer: TensorRef | None,
        steps: int | None,
        step_weights: Sequence[float] | None,
    ) -> tuple[Episodes, Sequence[Any]]:
        steps, batch = self._check_call(steps), check_batches(support, query)
        weights = arguments.weights_of_steps(step_weights, steps)
        statistics = Statistics(self.model, collect=True)

        def task(vectorize: bool, *parts: Any) -> tuple[Tensor, ...]:
            episode = Episode(self, parts[:2], statistics, vectorize)
            return *episode.run(parts[2:], steps, weights, layer), *episode.seen

        chunked = self.chunk_size is not None and torch.is_grad_enabled()
        weighted, losses, outputs, *rest = self._run(task, batch, chunked=chunked)
        features = int(layer is not None)
        statistics.update(rest[features:])
        return Episodes(weighted.mean(), losses, outputs), rest[:features]

    def _run(
        self, task: Callable[..., tuple[Tensor, ...]], batch: TaskBatch, *, check: bool = True, chunked: bool = False
    ) -> tuple[Any, ...]:
        plan = Plan(self.vectorize, self.chunk_size, self.same_draws, chunked)
        with ordinary_tensors(batch) as batch, without_fast_path():
            if check and not self._checked:  # once: takes a forward and a backward pass of one task
                with replaced(False, batch.first.device):
                    check_used(Measure(self.model, self.loss), start(self), batch.of_first_task())
                self._checked = True
            return self._form.run(task, self.model, batch, plan)

    def _check_call(self, steps: int | None) -> int:
        check_no_running_statistics(self.model)
        return self.steps if steps is None else check_non_negative_int("steps", steps)
