"""Scores of maps against the positions known to matter, as metrics over many samples."""

from abc import abstractmethod

from torch import Tensor

from lightning_plugins._checks import check_non_negative_int
from lightning_plugins.functional.attribution import (
    LocalizationScores,
    attribution_auroc,
    attribution_localization,
    localization_iou,
    pointing_game,
    relevance_rank_accuracy,
)
from lightning_plugins.metrics.attribution.base import AttributionMetric


class LocalizationMetric(AttributionMetric):
    """Base of the metrics that compare a map with a mask.

    Args:
        num_classes: Number of classes, for results per class.
        per_class: Whether to return one result per class; needs ``num_classes``.

    Raises:
        TypeError: If ``num_classes`` is not an int.
        ValueError: If it is less than 1, or missing although ``per_class`` is set.
    """

    higher_is_better = True

    def update(self, attributions: Tensor, masks: Tensor, classes: Tensor | None = None) -> None:
        """Add the samples of one batch.

        Args:
            attributions: Floating tensor of shape ``(B, [C,] *spatial)``; channels are summed.
            masks: Shape ``(B, *spatial)`` or ``(B, 1, *spatial)``.
            classes: Integers of shape ``(B,)``; needed with ``num_classes``.

        Raises:
            TypeError: If a tensor is of the wrong kind.
            ValueError: If shapes do not match, or classes are missing or out of range.
        """
        self.add(*self.score(attributions, masks), classes)

    @abstractmethod
    def score(self, attributions: Tensor, masks: Tensor) -> LocalizationScores:
        """Score each sample; implemented by subclasses.

        Args:
            attributions: As in ``update``.
            masks: As in ``update``.

        Returns:
            Scores and random baselines, shape ``(B,)`` each.
        """


class LocalizationIoU(LocalizationMetric):
    """Mean intersection over union of mask and the map's largest positions; see `localization_iou`.

    Args:
        num_classes: Number of classes, for results per class.
        per_class: Whether to return one result per class; needs ``num_classes``.

    Raises:
        TypeError: If ``num_classes`` is not an int.
        ValueError: If it is less than 1, or missing although ``per_class`` is set.

    Example:
        >>> import torch
        >>> metric = LocalizationIoU()
        >>> metric.update(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[1, 1, 0, 0]]))
        >>> result = metric.compute()
        >>> result.score.item(), round(result.random.item(), 3), result.skill.item()
        (1.0, 0.333, 1.0)
    """

    def score(self, attributions: Tensor, masks: Tensor) -> LocalizationScores:
        """Score each sample; see `localization_iou`."""
        return localization_iou(attributions, masks)


class RelevanceRankAccuracy(LocalizationMetric):
    """Mean fraction of the map's largest positions in the mask; see `relevance_rank_accuracy`.

    Args:
        num_classes: Number of classes, for results per class.
        per_class: Whether to return one result per class; needs ``num_classes``.

    Raises:
        TypeError: If ``num_classes`` is not an int.
        ValueError: If it is less than 1, or missing although ``per_class`` is set.

    Example:
        >>> import torch
        >>> metric = RelevanceRankAccuracy()
        >>> metric.update(torch.zeros(1, 4), torch.tensor([[1, 0, 0, 0]]))  # a constant map: the base rate
        >>> metric.compute().score.item()
        0.25
    """

    def score(self, attributions: Tensor, masks: Tensor) -> LocalizationScores:
        """Score each sample; see `relevance_rank_accuracy`."""
        return relevance_rank_accuracy(attributions, masks)


class AttributionLocalization(LocalizationMetric):
    """Mean fraction of the positive attribution in the mask; see `attribution_localization`.

    Args:
        weighted: Whether to divide each fraction by that of the mask; the baseline is then 1, and `skill`, which needs
            a best score, is NaN.
        num_classes: Number of classes, for results per class.
        per_class: Whether to return one result per class; needs ``num_classes``.

    Raises:
        TypeError: If ``num_classes`` is not an int.
        ValueError: If it is less than 1, or missing although ``per_class`` is set.

    Example:
        >>> import torch
        >>> metric = AttributionLocalization()
        >>> metric.update(torch.tensor([[3.0, 1.0, -4.0, 0.0]]), torch.tensor([[1, 0, 1, 0]]))
        >>> metric.compute().score.item()
        0.75
    """

    def __init__(self, *, weighted: bool = False, num_classes: int | None = None, per_class: bool = False) -> None:
        super().__init__(num_classes=num_classes, per_class=per_class)
        self.weighted = weighted

    def score(self, attributions: Tensor, masks: Tensor) -> LocalizationScores:
        """Score each sample; see `attribution_localization`."""
        return attribution_localization(attributions, masks, weighted=self.weighted)


class PointingGame(LocalizationMetric):
    """Fraction of samples whose maximum lies in the mask, or near it; see `pointing_game`.

    Args:
        tolerance: Number of positions by which masks are dilated.
        num_classes: Number of classes, for results per class.
        per_class: Whether to return one result per class; needs ``num_classes``.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If one is out of its range, or ``num_classes`` missing although ``per_class`` is set.

    Example:
        >>> import torch
        >>> metric = PointingGame(tolerance=1)
        >>> metric.update(torch.tensor([[1.0, 3.0, 0.0, 0.0]]), torch.tensor([[1, 0, 0, 0]]))
        >>> metric.compute().score.item()
        1.0
    """

    def __init__(self, *, tolerance: int = 0, num_classes: int | None = None, per_class: bool = False) -> None:
        super().__init__(num_classes=num_classes, per_class=per_class)
        self.tolerance = check_non_negative_int("tolerance", tolerance)

    def score(self, attributions: Tensor, masks: Tensor) -> LocalizationScores:
        """Score each sample; see `pointing_game`."""
        return pointing_game(attributions, masks, tolerance=self.tolerance)


class AttributionAUROC(LocalizationMetric):
    """Mean area under the ROC curves of maps as detectors of masks; see `attribution_auroc`.

    Args:
        num_classes: Number of classes, for results per class.
        per_class: Whether to return one result per class; needs ``num_classes``.

    Raises:
        TypeError: If ``num_classes`` is not an int.
        ValueError: If it is less than 1, or missing although ``per_class`` is set.

    Example:
        >>> import torch
        >>> metric = AttributionAUROC()
        >>> metric.update(torch.tensor([[3.0, 2.0, 2.0, 0.0]]), torch.tensor([[1, 0, 1, 0]]))
        >>> metric.compute().score.item()
        0.875
    """

    def score(self, attributions: Tensor, masks: Tensor) -> LocalizationScores:
        """Score each sample; see `attribution_auroc`."""
        return attribution_auroc(attributions, masks)
