"""Response of models to the removal of attributed positions, as metrics over many samples."""

from typing import Literal

import torch
from torch import Tensor

from lightning_plugins._checks import check_bool, check_choice, check_positive_int
from lightning_plugins.functional.attribution import (
    Perturbation,
    curve_area,
    degradation_score,
    perturbation_curve,
    random_attributions,
    scaled_curve,
)
from lightning_plugins.functional.attribution.curves import CurveSteps
from lightning_plugins.functional.attribution.replacement import checked_perturbation
from lightning_plugins.functional.attribution.scoring import MAX_FORWARD_BATCH, Forward, check_inputs, checked_target
from lightning_plugins.metrics._sums import SumMetric
from lightning_plugins.metrics.attribution.base import AttributionScore, class_rows, rows_of_sums, skill_of
from lightning_plugins.metrics.attribution.by_forward import ForwardMetric

Reduction = Literal["sum", "mean"]
Kind = Literal["aopc", "deletion", "insertion"]


class DegradationScore(SumMetric):
    """Area between the mean curves for removing the least and the most relevant patches first, scaled per class.

    For each class and each of the two orders the probabilities of all its samples are averaged at every point, and the
    mean curve is scaled to fall from 1 to 0; the score is the area between the two. Sums of curves are stored, so the
    result is exact over batches and ranks. A class whose mean curve ends at its initial value has no score: its samples
    count as undefined.

    Args:
        num_classes: Number of classes; None treats all samples as one class.
        steps: Number of points after the first; the patches are distributed over them, so that at the last one all are
            replaced. Equal to their number for one patch at a time.
        perturbation: How patches are replaced; `Perturbation`'s defaults if None.
        reduction: ``"mean"`` over the points, or their ``"sum"``, as published.
        per_class: Whether to return one result per class instead of means over the classes with a score.
        baseline: Whether to evaluate random maps too; otherwise ``random`` is 0, their expected value.
        max_forward_batch: Maximum number of inputs in one forward pass.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its range.

    Example:
        >>> forward = lambda x: torch.stack([x.sum(1), 0 * x.sum(1)], 1)
        >>> x = torch.tensor([[4.0, 2.0, 1.0, 1.0]])
        >>> metric = DegradationScore(steps=4, perturbation=Perturbation(patch=1, replacement="zero"))
        >>> metric.update(forward, x, x, torch.tensor([0]))
        >>> bool(metric.compute().score > 0.1)
        True

    Source:
        Suh et al., arXiv 2211.12702. Our reading: the mean over classes weights all classes equally.
    """

    higher_is_better = True
    curves: Tensor
    count: Tensor
    undefined: Tensor

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        steps: int = 64,
        perturbation: Perturbation | None = None,
        reduction: Reduction = "mean",
        per_class: bool = False,
        baseline: bool = True,
        max_forward_batch: int = MAX_FORWARD_BATCH,
    ) -> None:
        super().__init__()
        size = rows_of_sums(num_classes, per_class)
        self.num_classes, self.per_class, self.baseline = num_classes, per_class, check_bool("baseline", baseline)
        self.steps = check_positive_int("steps", steps)
        self.perturbation = checked_perturbation(perturbation, Perturbation())
        self.reduction: Reduction = reduction
        check_choice("reduction", reduction, ("sum", "mean"))
        self.max_forward_batch = check_positive_int("max_forward_batch", max_forward_batch)
        # dimensions: own or random map, least or most relevant first, class, point
        self.add_state("curves", torch.zeros(2, 2, size, steps + 1, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(size, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("undefined", torch.zeros(size, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, forward: Forward, inputs: Tensor, attributions: Tensor, target: Tensor) -> None:
        """Add the samples of one batch; their class is ``target`` where the metric has classes.

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
        target = checked_target(target, len(inputs)).long()
        index = class_rows("target", target, len(inputs), self.num_classes).to(self.count.device)
        maps = (attributions, random_attributions(inputs)) if self.baseline else (attributions,)
        found = torch.stack(
            [
                torch.stack([self._curve(forward, inputs, own, target, order) for order in ("least", "most")])
                for own in maps
            ]
        )
        defined = torch.isfinite(found).all(-1).all(0).all(0).to(index.device)
        kept = torch.where(defined[:, None], found.to(self.curves), 0.0)
        added = torch.zeros_like(self.curves)
        added[: len(maps)].index_add_(2, index, kept)
        self.curves = self.curves + added
        self.count = self.count.index_add(0, index, defined.long())
        self.undefined = self.undefined.index_add(0, index, (~defined).long())

    def compute(self) -> AttributionScore:
        """Score of all samples of all batches and ranks.

        Returns:
            Scalars, or tensors of shape ``(num_classes,)`` with ``per_class``.
        """
        means = self.curves / self.count[:, None]
        own = degradation_score(means[0, 0], means[0, 1], reduction=self.reduction)
        random = torch.where(self.count > 0, torch.zeros_like(own), torch.nan)
        if self.baseline:
            random = degradation_score(means[1, 0], means[1, 1], reduction=self.reduction)
        flat = own.isnan()
        count, undefined = torch.where(flat, 0, self.count), self.undefined + torch.where(flat, self.count, 0)
        if not self.per_class:
            own, random, count, undefined = own.nanmean(), random.nanmean(), count.sum(), undefined.sum()
        return AttributionScore(own, random, skill_of(own, random, self.best_score), count, undefined)

    @property
    def best_score(self) -> float:
        """The score for curves that fall only at the last and only at the first point."""
        return self.steps + 1.0 if self.reduction == "sum" else 1.0

    def scaled_curves(self) -> Tensor:
        """Scaled mean curves of each class, for figures.

        Returns:
            Shape ``(2, classes, steps + 1)``: least, then most relevant first; NaN for classes without a score.
        """
        return scaled_curve(self.curves[0] / self.count[:, None])

    def _curve(
        self, forward: Forward, inputs: Tensor, maps: Tensor, target: Tensor, order: Literal["least", "most"]
    ) -> Tensor:
        return perturbation_curve(
            forward,
            inputs,
            maps,
            target,
            perturbation=self.perturbation,
            order=order,
            steps=CurveSteps(count=self.steps, spread=True),
            max_forward_batch=self.max_forward_batch,
        )


class RegionPerturbation(ForwardMetric):
    """Area of the curve of the class probability as patches are replaced one by one.

    ``"aopc"`` is the area over it, the mean of ``y_0 - y_k``, with the most relevant patches first, higher is better;
    ``"deletion"`` is the area under it, lower is better. ``"insertion"`` reads the curve for the least relevant patches
    first from its end: the most relevant patches are inserted first into an input without any, higher is better.

    Args:
        kind: ``"aopc"``, ``"deletion"`` or ``"insertion"``.
        order: ``"most"`` or ``"least"`` relevant first, for ``"aopc"``; the score of the latter should be small.
        steps: Number of points after the first, one patch each; the last point is repeated if there are fewer patches.
            By default 100 for ``"aopc"``, and the number of patches for the others, which ``"insertion"`` requires.
        perturbation: How patches are replaced; by zeros in windows of 16 if None.
        baseline: Whether to evaluate random maps too; otherwise ``random`` and ``skill`` are NaN.
        num_classes: Number of classes, for results per class.
        per_class: Whether to return one result per class; needs ``num_classes``.
        max_forward_batch: Maximum number of inputs in one forward pass.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its range.

    Example:
        >>> forward = lambda x: torch.stack([x.sum(1), 0 * x.sum(1)], 1)
        >>> x = torch.tensor([[4.0, 2.0, 0.0, 0.0]])
        >>> metric = RegionPerturbation(steps=4, perturbation=Perturbation(patch=1, replacement="zero"))
        >>> metric.update(forward, x, x, torch.tensor([0]))
        >>> result = metric.compute()
        >>> bool(result.score > result.random)
        True

    Source:
        Samek et al., TNNLS 2017, https://arxiv.org/abs/1509.06321; Petsiuk et al., BMVC 2018.
    """

    higher_is_better = True

    def __init__(
        self,
        kind: Kind = "aopc",
        *,
        order: Literal["most", "least"] = "most",
        steps: int | None = None,
        perturbation: Perturbation | None = None,
        baseline: bool = True,
        num_classes: int | None = None,
        per_class: bool = False,
        max_forward_batch: int = MAX_FORWARD_BATCH,
    ) -> None:
        super().__init__(num_classes=num_classes, per_class=per_class, max_forward_batch=max_forward_batch)
        self.kind = check_choice("kind", kind, ("aopc", "deletion", "insertion"))
        self.order: Literal["most", "least"] = order
        check_choice("order", order, ("most", "least"))
        if kind != "aopc" and order != "most":
            raise ValueError(f"`order='least'` is for `kind='aopc'`; {kind!r} has its own order")
        if kind == "insertion" and steps is not None:
            raise ValueError(f"`steps` of `kind='insertion'` are all patches, got {steps!r}; leave it None")
        published = 100 if kind == "aopc" else None
        self.steps = published if steps is None else check_positive_int("steps", steps)
        self.perturbation = checked_perturbation(perturbation, Perturbation(replacement="zero"))
        self.baseline = check_bool("baseline", baseline)
        self.best = 0.0 if kind == "deletion" else 1.0

    def score(self, forward: Forward, inputs: Tensor, attributions: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Area of the curve of each sample, and that of a random map."""
        scores = self._areas(forward, inputs, attributions, target)
        random = torch.zeros_like(scores)
        if self.baseline:
            random = self._areas(forward, inputs, random_attributions(inputs), target)
        return scores, random

    def compute(self) -> AttributionScore:
        """Mean over all samples of all batches and ranks.

        Returns:
            Scalars, or tensors of shape ``(num_classes,)`` with ``per_class``.
        """
        result = super().compute()
        unknown = torch.full_like(result.random, torch.nan)
        return result if self.baseline else result._replace(random=unknown, skill=unknown)

    def _areas(self, forward: Forward, inputs: Tensor, maps: Tensor, target: Tensor) -> Tensor:
        curves = perturbation_curve(
            forward,
            inputs,
            maps,
            target,
            perturbation=self.perturbation,
            order="least" if self.kind == "insertion" else self.order,
            steps=self.steps,
            max_forward_batch=self.max_forward_batch,
        )
        return curve_area(curves[:, :1] - curves if self.kind == "aopc" else curves)
