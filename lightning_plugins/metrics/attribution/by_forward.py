"""Base class of metrics that run the model on perturbed inputs."""

from abc import abstractmethod

from torch import Tensor

from lightning_plugins._checks import check_positive_int
from lightning_plugins.functional.attribution.scoring import MAX_FORWARD_BATCH, Forward, check_inputs
from lightning_plugins.functional.tensors import check_dims, check_floating
from lightning_plugins.metrics.attribution.base import AttributionMetric


class ForwardMetric(AttributionMetric):
    """Base class of metrics that compare a map with the model's behaviour.

    The model is passed to ``update`` and is not part of the metric.

    Args:
        num_classes: Number of classes, for results per class.
        per_class: Whether to return one result per class; needs ``num_classes``.
        max_forward_batch: Maximum number of inputs in one forward pass.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If one is less than 1, or ``num_classes`` missing although ``per_class`` is set.
    """

    def __init__(
        self, *, num_classes: int | None = None, per_class: bool = False, max_forward_batch: int = MAX_FORWARD_BATCH
    ) -> None:
        super().__init__(num_classes=num_classes, per_class=per_class)
        self.max_forward_batch = check_positive_int("max_forward_batch", max_forward_batch)

    def update(self, forward: Forward, inputs: Tensor, attributions: Tensor, target: Tensor) -> None:
        """Add the samples of one batch; ``target`` is also their class for results per class.

        Args:
            forward: Maps inputs to logits of shape ``(n, classes)``; in evaluation mode.
            inputs: Shape ``(B, [C,] *spatial)``.
            attributions: The same shape, with any number of channels or without that dimension.
            target: Class of each sample, integers of shape ``(B,)``.

        Raises:
            TypeError: If a tensor is of the wrong kind.
            ValueError: If shapes do not match, or a class is out of range.
        """
        check_inputs(inputs)
        check_floating("attributions", attributions)
        check_dims("attributions", attributions, 2, "(B, [C,] *spatial)")
        self.add(*self.score(forward, inputs, attributions, target), target, name="target")

    @abstractmethod
    def score(self, forward: Forward, inputs: Tensor, attributions: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Score each sample; implemented by subclasses.

        Args:
            forward: As in ``update``.
            inputs: As in ``update``.
            attributions: As in ``update``.
            target: As in ``update``.

        Returns:
            Scores and those of random maps, shape ``(B,)`` each.
        """
