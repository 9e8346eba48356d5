"""Meta-learning with inner loops for LightningModules: the steps of all stages, and the optimizer."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_plugins._checks import check_finite_number, check_instance
from lightning_plugins._grouping import Group, grouped
from lightning_plugins._lightning import LightningModule
from lightning_plugins.meta import Episodes, InnerLoop, Preconditioner, Vectorization
from lightning_plugins.meta.loop.arguments import check_layer, weights_of_steps
from lightning_plugins.meta.loop.tasks import cat_tasks
from lightning_plugins.mixins._inner_settings import InnerSettings
from lightning_plugins.mixins._meta_measures import Measures, as_part_of_all, collection_of
from lightning_plugins.mixins._meta_random import RandomStates
from lightning_plugins.mixins._meta_requirements import (
    Samples,
    refuse_hooks,
    require_lightning_module,
    require_network,
    require_order,
    require_whole_parameters,
    unpacked,
    unpacked_for_prediction,
)

_INNER = Group(
    InnerSettings,
    older={
        "inner_steps": "steps",
        "inner_learning_rate": "learning_rate",
        "chunk_size": "vectorize.chunk_size",
        "randomness": "vectorize.randomness",
    },
    nested={"vectorize": Group(Vectorization, main="mode")},
)

if TYPE_CHECKING:
    _Module = LightningModule
else:
    _Module = object  # the class it is mixed into brings the base


class MAMLMixin(_Module):
    """Gives a LightningModule the steps of meta-learning: adapt to a task's support samples, evaluate on its query.

    A batch is ``((support_x, support_y), (query_x, query_y))``, tensors of shapes ``(tasks, samples, ...)`` as
    `lightning_plugins.meta.InnerLoop` takes them. ``predict_step`` takes ``((support_x, support_y), query_x)``, too.
    Training, validation, test and prediction work in inference mode and without it.

    List it *before* LightningModule and pass the network and the loss to ``super().__init__``. The network is then
    ``self.network``, and ``self.inner_loop`` the loop with everything that is learned. You can override every step and
    ``configure_optimizers``: `adapt_and_measure` returns the loss, `parameter_groups` the optimizer's groups.

    Logs ``train/loss`` at every training step and ``val/loss`` and ``test/loss`` over an epoch, means over the tasks of
    all ranks, and the ``metrics`` as ``val/<name>`` and ``test/<name>``; with several loaders each has its own. A
    checkpoint has the state of the random generators, so that dropout in a resumed run continues identically.

    Several ranks give the loss and the gradient of one process that sees all tasks, even if their batches differ in the
    number of tasks. This differs from Lightning's default, which weights the mean of every rank equally. Accumulated
    batches are weighted equally, as with every loss: with equal numbers of tasks they act as one large batch.

    Args:
        network: Maps a task's inputs to outputs.
        loss: As for `lightning_plugins.meta.InnerLoop`.
        preconditioner: Transforms inner gradients; see `lightning_plugins.meta`. None uses the plain gradient.
        inner: `lightning_plugins.mixins.InnerSettings`: steps in training and evaluation, their learning rates, the
            layers that adapt, and the order of the tasks.
        learning_rate: Adam's learning rate for the network's weights.
        preconditioner_learning_rate: Adam's learning rate for the preconditioner and for learned inner rates; by
            default ``learning_rate``.
        step_weights: As for a call of `lightning_plugins.meta.InnerLoop`, for training.
        features: A layer of the network whose outputs (``"name:input"``: inputs) on the training step's query samples
            are passed through ``self.query_features``, a module that callbacks can select, with shape
            ``(tasks * samples, ...)`` and gradients through all inner steps.
        metrics: Torchmetrics metrics by name, updated with outputs and targets of shapes ``(tasks, samples, ...)`` in
            validation and test; such as `lightning_plugins.metrics.FewShotAccuracy`.

    Raises:
        TypeError: If an argument has the wrong type, or this class is not mixed into a LightningModule, before it.
        ValueError: If an argument is out of its range.

    Example:
        >>> from lightning_plugins._lightning import LightningModule
        >>> from lightning_plugins.mixins import InnerSettings
        >>> class Few(MAMLMixin, LightningModule):
        ...     def __init__(self, width: int = 8):
        ...         network = nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, 1))
        ...         super().__init__(network, nn.functional.mse_loss, inner=InnerSettings(steps=1))
        >>> x, y = torch.randn(4, 5, 1), torch.randn(4, 5, 1)  # four tasks of five samples
        >>> bool(Few().training_step(((x, y), (x, y)), 0).isfinite())
        True

    Source:
        Finn, Abbeel and Levine, ICML 2017, https://arxiv.org/abs/1703.03400.
    """

    @grouped(inner=_INNER)
    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        preconditioner: Preconditioner | None = None,
        *,
        inner: InnerSettings = InnerSettings(),
        learning_rate: float = 1e-3,
        preconditioner_learning_rate: float | None = None,
        step_weights: Sequence[float] | None = None,
        features: str | None = None,
        metrics: dict[str, Metric] | None = None,
    ) -> None:
        super().__init__()
        require_lightning_module(self, MAMLMixin)
        check_instance("inner", inner, InnerSettings, "InnerSettings, such as `InnerSettings(steps=5)`")
        self.inner_loop = InnerLoop(
            require_network(network),
            loss,
            self._preconditioner(preconditioner),
            steps=inner.steps,
            learning_rate=inner.learning_rate,
            rates=inner.rates,
            first_order=inner.first_order,
            layers=inner.layers,
            vectorize=inner.vectorize,
        )
        self.evaluation_steps = inner.evaluation_steps
        self.learning_rate = _check_rate("learning_rate", learning_rate)
        second = learning_rate if preconditioner_learning_rate is None else preconditioner_learning_rate
        self.preconditioner_learning_rate = _check_rate("preconditioner_learning_rate", second)
        self.step_weights = None if step_weights is None else weights_of_steps(step_weights, inner.steps)
        self.features = features
        if features is not None:
            if self.inner_loop.chunk_size is not None:
                got = self.inner_loop.chunk_size
                raise ValueError(f"`chunk_size` must be None where `features` is given, got {got}")
            check_layer(network, features, "features")
            self.query_features = nn.Identity()
        collection = collection_of(metrics)
        self.val_measures, self.test_measures = Measures("val", collection), Measures("test", collection)
        self._random_states = RandomStates()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise an error for classes in which LightningModule's own steps would take precedence."""
        super().__init_subclass__(**kwargs)
        require_order(cls, MAMLMixin)

    @property
    def network(self) -> nn.Module:
        """The network whose parameters are adapted."""
        return self.inner_loop.model

    def setup(self, stage: str) -> None:
        """Raise an error for strategies that shard parameters."""
        super().setup(stage)
        require_whole_parameters(self)

    def forward(self, support: Samples, query_inputs: Tensor) -> Tensor:
        """Adapt to every task with ``inner.evaluation_steps``, and predict.

        Args:
            support: Inputs and targets of shapes ``(tasks, samples, ...)``.
            query_inputs: Shape ``(tasks, samples, ...)``.

        Returns:
            Outputs of shape ``(tasks, samples, ...)``, with their gradient.
        """
        adapted = self.inner_loop.adapt(support, steps=self.evaluation_steps)
        outputs: Tensor = self.inner_loop.predict(adapted, query_inputs, steps=self.evaluation_steps)
        return outputs

    def adapt_and_measure(self, batch: tuple[Samples, Samples]) -> Episodes:
        """Adapt to the support samples of a batch's tasks and evaluate on their query samples.

        In training mode with ``inner.steps``, else with ``inner.evaluation_steps``. In training mode every rank must
        call it, and the loss is scaled such that its mean over ranks, and DDP's mean of its gradients, are those of the
        mean over the tasks of all ranks. Add your own terms to it, and return the sum from ``training_step``.

        Args:
            batch: ``((support_x, support_y), (query_x, query_y))``, tensors of shapes ``(tasks, samples, ...)``.

        Returns:
            The loss, the losses of this rank's tasks and the outputs, as from `lightning_plugins.meta.InnerLoop`.

        Raises:
            TypeError: If the batch is not two pairs of tensors, or network or loss return no tensor.
            ValueError: If shapes do not fit; see `lightning_plugins.meta.InnerLoop`.
        """
        return self._episodes(batch)[0]

    def adapt_and_measure_features(self, batch: tuple[Samples, Samples]) -> tuple[Episodes, Tensor]:
        """Like `adapt_and_measure`, but also return the ``features`` of the query samples for your own term.

        Args:
            batch: As for `adapt_and_measure`.

        Returns:
            The episodes, and the adapted networks' features, ``(tasks * samples, ...)``, with their gradient.

        Raises:
            TypeError: As for `adapt_and_measure`.
            ValueError: Likewise, or if the constructor was given no ``features``.
        """
        episodes, features = self._episodes(batch)
        if features is None:
            raise ValueError("`features` must be given to the constructor: the name of a layer of the network")
        return episodes, features

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch of tasks, and log it."""
        loss = self.adapt_and_measure(batch).loss
        if self._trainer is not None:
            self.log("train/loss", loss.detach(), sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the loss and the metrics of a batch of tasks."""
        self._evaluate(self.val_measures, batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the loss and the metrics of a batch of tasks."""
        self._evaluate(self.test_measures, batch, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the adapted networks' outputs on the query samples, ``(tasks, samples, ...)``."""
        outputs: Tensor = self(*unpacked_for_prediction(batch))
        return outputs.detach()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return optimizer parameter groups: the weights, and the other learned parameters of the inner loop.

        Returns:
            ``"weights"``, including other parameters of your class, and ``"preconditioner"`` if there are any.
        """
        learned = [*self.inner_loop.preconditioner.parameters(), *self.inner_loop.rates.parameters()]
        known = set(map(id, learned))
        weights = [parameter for parameter in self.parameters() if id(parameter) not in known]
        groups = [{"params": weights, "lr": self.learning_rate, "name": "weights"}]
        if learned:
            groups += [{"params": learned, "lr": self.preconditioner_learning_rate, "name": "preconditioner"}]
        return groups

    def configure_optimizers(self) -> Any:
        """Return Adam with the two learning rates."""
        return torch.optim.Adam(self.parameter_groups())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the states of the random generators of all ranks."""
        super().on_save_checkpoint(checkpoint)
        self._random_states.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the states of this rank's random generators for resuming."""
        super().on_load_checkpoint(checkpoint)
        self._random_states.load(self, checkpoint)

    def on_fit_start(self) -> None:
        """Restore the random generators of a checkpoint saved between epochs."""
        super().on_fit_start()
        self._random_states.restore(self, between_epochs=True)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Restore the random generators of a checkpoint saved within an epoch."""
        self._random_states.restore(self, between_epochs=False)
        return super().on_train_batch_start(batch, batch_idx)

    def _episodes(self, batch: Any) -> tuple[Episodes, Tensor | None]:
        require_whole_parameters(self)
        refuse_hooks(self.network)
        settings: dict[str, Any] = {"steps": self.evaluation_steps}
        if self.training:
            settings = {"step_weights": self.step_weights}
        if self.features is None:
            episodes, features = self.inner_loop(*unpacked(batch), **settings), None
        else:
            episodes, kept = self.inner_loop.with_features(*unpacked(batch), self.features, **settings)
            features = self.query_features(cat_tasks(kept))
        if self.training:
            episodes = episodes._replace(loss=as_part_of_all(episodes.loss, len(episodes.losses)))
        return episodes, features

    def _evaluate(self, measures: Measures, batch: Any, loader: int) -> None:
        episodes = self.adapt_and_measure(batch)
        found = measures.updated(episodes, unpacked(batch)[1][1], loader)
        if self._trainer is not None:
            self._metric_attributes = None  # Lightning caches the metrics, and those of this loader may be new
            self.log_dict(found, batch_size=len(episodes.losses))

    def _preconditioner(self, given: Preconditioner | None) -> Preconditioner | None:
        return given


def _check_rate(name: str, rate: float) -> float:
    if check_finite_number(name, rate) < 0:
        raise ValueError(f"`{name}` must be at least 0, got {rate}")
    return rate
