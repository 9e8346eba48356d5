"""Agreement of attributions with the response of models to perturbed inputs, as metrics over many samples."""

import math

import torch
from torch import Tensor

from lightning_plugins._checks import (
    check_bool,
    check_fraction,
    check_non_negative_int,
    check_positive_int,
    check_positive_number,
)
from lightning_plugins._grouping import Group, grouped
from lightning_plugins.functional.attribution import (
    Perturbation,
    faithfulness_correlation,
    infidelity,
    random_attributions,
    sensitivity,
)
from lightning_plugins.functional.attribution.infidelity import NoiseDraws, as_noise
from lightning_plugins.functional.attribution.random import random_normal, sample_keys
from lightning_plugins.functional.attribution.replacement import checked_perturbation
from lightning_plugins.functional.attribution.scoring import MAX_FORWARD_BATCH, Explain, Forward
from lightning_plugins.metrics.attribution.base import AttributionMetric
from lightning_plugins.metrics.attribution.by_forward import ForwardMetric


class FaithfulnessCorrelation(ForwardMetric):
    """Mean correlation of attributions with score drops; see `faithfulness_correlation`.

    The random baseline is 0, the expectation for maps that are independent of the model.

    Args:
        draws: Number of random sets of positions per sample.
        share: Fraction of the positions in a set.
        perturbation: How they are replaced; by default with zeros.
        num_classes: Number of classes, for results per class.
        per_class: Whether to return one result per class; needs ``num_classes``.
        max_forward_batch: Maximum number of inputs in one forward pass.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its range.

    Example:
        >>> forward = lambda x: torch.stack([x.sum(1), 0 * x.sum(1)], 1)
        >>> x = torch.arange(1.0, 21.0).reshape(1, 20)
        >>> metric = FaithfulnessCorrelation(draws=10)
        >>> metric.update(forward, x, x, torch.tensor([0]))
        >>> round(metric.compute().score.item(), 3)
        1.0
    """

    higher_is_better = True

    def __init__(
        self,
        *,
        draws: int = 100,
        share: float = 0.1,
        perturbation: Perturbation | None = None,
        num_classes: int | None = None,
        per_class: bool = False,
        max_forward_batch: int = MAX_FORWARD_BATCH,
    ) -> None:
        super().__init__(num_classes=num_classes, per_class=per_class, max_forward_batch=max_forward_batch)
        self.draws, self.share = check_positive_int("draws", draws), check_fraction("share", share)
        self.perturbation = checked_perturbation(perturbation, Perturbation(patch=1, replacement="zero"))

    def score(self, forward: Forward, inputs: Tensor, attributions: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Score each sample; see `faithfulness_correlation`."""
        scores = faithfulness_correlation(
            forward,
            inputs,
            attributions,
            target,
            draws=self.draws,
            share=self.share,
            perturbation=self.perturbation,
            max_forward_batch=self.max_forward_batch,
        )
        return scores, torch.zeros_like(scores)


class Infidelity(ForwardMetric):
    """Mean squared error of maps as predictions of the effect of noise; lower is better; see `infidelity`.

    The baseline are random maps of the same size on the same samples.

    Args:
        draws: How often noise is drawn for each sample; or `lightning_plugins.functional.attribution.NoiseDraws`, with
            its standard deviation and seed.
        normalize: Whether each map is first scaled by the factor that fits best.
        num_classes: Number of classes, for results per class.
        per_class: Whether to return one result per class; needs ``num_classes``.
        max_forward_batch: Maximum number of inputs in one forward pass.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its range.

    Example:
        >>> forward = lambda x: torch.stack([3 * x.sum(1), x.sum(1)], 1)
        >>> metric = Infidelity()
        >>> metric.update(forward, torch.ones(1, 4), torch.full((1, 4), 3.0), torch.tensor([0]))
        >>> metric.compute().score.item() < 1e-9
        True
    """

    higher_is_better = False
    best = 0.0

    @grouped(draws=Group(NoiseDraws, main="count"))
    def __init__(
        self,
        *,
        draws: int | NoiseDraws = 10,
        normalize: bool = True,
        num_classes: int | None = None,
        per_class: bool = False,
        max_forward_batch: int = MAX_FORWARD_BATCH,
    ) -> None:
        super().__init__(num_classes=num_classes, per_class=per_class, max_forward_batch=max_forward_batch)
        self.noise, self.normalize = as_noise(draws), check_bool("normalize", normalize)
        self.draws, self.std, self.seed = self.noise.count, self.noise.std, self.noise.seed

    def score(self, forward: Forward, inputs: Tensor, attributions: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Score each sample; see `infidelity`."""
        maps = random_normal(sample_keys(inputs), math.prod(inputs.shape[1:]), seed=self.seed + 7).reshape(inputs.shape)
        size = attributions.detach().flatten(1).float().norm(dim=1) / maps.flatten(1).norm(dim=1)
        random = self._errors(forward, inputs, maps * size.reshape(-1, *[1] * (inputs.ndim - 1)), target)
        return self._errors(forward, inputs, attributions, target), random

    def _errors(self, forward: Forward, inputs: Tensor, maps: Tensor, target: Tensor) -> Tensor:
        return infidelity(
            forward,
            inputs,
            maps,
            target,
            draws=self.noise,
            normalize=self.normalize,
            max_forward_batch=self.max_forward_batch,
        )


class Sensitivity(AttributionMetric):
    """Mean largest relative change of maps under small changes of inputs; lower is better; see `sensitivity`.

    The baseline is that of maps drawn anew for every input.

    Args:
        draws: How often each input is moved.
        radius: By how much at most.
        seed: Of the moves.
        num_classes: Number of classes, for results per class.
        per_class: Whether to return one result per class; needs ``num_classes``.
        max_forward_batch: Maximum number of inputs that are explained at once.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its range.

    Example:
        >>> metric = Sensitivity(radius=0.1)
        >>> metric.update(lambda x, target: x, torch.ones(2, 4), torch.tensor([0, 1]))
        >>> bool(metric.compute().score < 0.1)
        True
    """

    higher_is_better = False
    best = 0.0

    def __init__(
        self,
        *,
        draws: int = 10,
        radius: float = 0.02,
        seed: int = 0,
        num_classes: int | None = None,
        per_class: bool = False,
        max_forward_batch: int = MAX_FORWARD_BATCH,
    ) -> None:
        super().__init__(num_classes=num_classes, per_class=per_class)
        self.draws, self.radius = check_positive_int("draws", draws), check_positive_number("radius", radius)
        self.seed = check_non_negative_int("seed", seed)
        self.max_forward_batch = check_positive_int("max_forward_batch", max_forward_batch)

    def update(self, explain: Explain, inputs: Tensor, target: Tensor) -> None:
        """Add the samples of one batch; their class is ``target`` where the metric has classes.

        Args:
            explain: Maps inputs and their classes to attributions.
            inputs: Shape ``(B, ...)``.
            target: Class of each sample, integers of shape ``(B,)``.

        Raises:
            TypeError: If a tensor is of the wrong kind.
            ValueError: If shapes do not match, or a class is out of range.
        """
        random = self._changes(lambda x, _: random_attributions(x, seed=self.seed), inputs, target)
        self.add(self._changes(explain, inputs, target), random, target, name="target")

    def _changes(self, explain: Explain, inputs: Tensor, target: Tensor) -> Tensor:
        return sensitivity(
            explain,
            inputs,
            target,
            draws=self.draws,
            radius=self.radius,
            seed=self.seed,
            max_forward_batch=self.max_forward_batch,
        )
