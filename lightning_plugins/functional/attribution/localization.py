"""Scores of attribution maps against ground-truth positions, per sample.

All functions take maps ``(B, [C,] *spatial)`` and masks ``(B, *spatial)`` or ``(B, 1, *spatial)`` with any number of
spatial dimensions; channels are summed first. Ties are broken in expectation: tied positions are counted fractionally,
so no score depends on their order. A sample whose mask is empty or whose map has a NaN or an infinity gives NaN.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins._checks import check_bool, check_non_negative_int, check_positive_int
from lightning_plugins.functional.attribution._ordering import count, expected_hits, hits_above, pairs_in_order
from lightning_plugins.functional.attribution.positions import flat_positions


class LocalizationScores(NamedTuple):
    """Scores of samples, and the expected scores of a random map on the same masks.

    Attributes:
        score: Shape ``(B,)``; NaN where it is not defined.
        random: Shape ``(B,)``; NaN where ``score`` is.
    """

    score: Tensor
    random: Tensor


def localization_iou(attributions: Tensor, masks: Tensor) -> LocalizationScores:
    """Intersection over union of the mask and the ``N`` largest positions of the map, ``N`` the size of the mask.

    With ``h`` hits among them it is ``h / (2 N - h)``. Ties are included through the expected number of hits; a
    constant map has ``N**2 / L`` and gives ``q / (2 - q)``, the base rate ``q = N / L`` as an IoU, which is also the
    random baseline.

    Args:
        attributions: Floating tensor of shape ``(B, [C,] *spatial)``.
        masks: Shape ``(B, *spatial)`` or ``(B, 1, *spatial)``.

    Returns:
        Scores in ``[0, 1]``.

    Raises:
        TypeError: If ``attributions`` is not a floating tensor or ``masks`` no tensor.
        ValueError: If the shapes do not match.

    Example:
        >>> localization_iou(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[1, 0, 1, 0]])).score
        tensor([0.3333])

    Source:
        Suh et al., arXiv 2211.12702. Our reading: the IoU of the expected hits, not the expected IoU, which
        differs by the small variance of the hits among ties.
    """
    maps, truth = flat_positions(attributions, masks)
    size = count(truth, maps)
    hits, rate = expected_hits(maps, truth, size), size / maps.shape[1]
    return _defined(hits / (2 * size - hits), rate / (2 - rate), maps, truth)


def relevance_rank_accuracy(attributions: Tensor, masks: Tensor) -> LocalizationScores:
    """Fraction of the ``N`` largest positions of the map that lie in the mask, ``N`` the size of the mask.

    Args:
        attributions: Floating tensor of shape ``(B, [C,] *spatial)``.
        masks: Shape ``(B, *spatial)`` or ``(B, 1, *spatial)``.

    Returns:
        Scores in ``[0, 1]``; a constant map gives the base rate ``N / L``, the random baseline.

    Raises:
        TypeError: If ``attributions`` is not a floating tensor or ``masks`` no tensor.
        ValueError: If the shapes do not match.

    Example:
        >>> relevance_rank_accuracy(torch.zeros(1, 4), torch.tensor([[1, 0, 0, 0]]))  # all tied
        LocalizationScores(score=tensor([0.2500]), random=tensor([0.2500]))

    Source:
        Arras et al., Information Fusion 2022, https://arxiv.org/abs/2003.07258.
    """
    maps, truth = flat_positions(attributions, masks)
    size = count(truth, maps)
    return _defined(expected_hits(maps, truth, size) / size, size / maps.shape[1], maps, truth)


def top_k_intersection(attributions: Tensor, masks: Tensor, k: int) -> LocalizationScores:
    """Fraction of the ``k`` largest positions of the map that lie in the mask.

    Args:
        attributions: Floating tensor of shape ``(B, [C,] *spatial)``.
        masks: Shape ``(B, *spatial)`` or ``(B, 1, *spatial)``.
        k: Number of positions, at most their total number.

    Returns:
        Scores in ``[0, 1]``; a constant map gives the base rate ``N / L``, the random baseline.

    Raises:
        TypeError: If ``attributions`` is not a floating tensor, ``masks`` no tensor or ``k`` no int.
        ValueError: If the shapes do not match, or ``k`` is out of its range.

    Example:
        >>> top_k_intersection(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[1, 0, 1, 0]]), k=1).score
        tensor([1.])

    Source:
        Theiner et al., WACV 2022, https://arxiv.org/abs/2104.14995.
    """
    maps, truth = flat_positions(attributions, masks)
    if check_positive_int("k", k) > maps.shape[1]:
        raise ValueError(f"`k` must be at most the number of positions, {maps.shape[1]}, got {k}")
    hits = hits_above(maps, truth, maps.topk(k, dim=1).values[:, -1:], k)
    return _defined(hits / k, count(truth, maps) / maps.shape[1], maps, truth)


def attribution_localization(attributions: Tensor, masks: Tensor, *, weighted: bool = False) -> LocalizationScores:
    """Fraction of the positive attribution that lies in the mask.

    Only positive values count, so the fraction is within ``[0, 1]`` for signed maps. A map without positive values is
    treated like a constant one and scores the base rate.

    Args:
        attributions: Floating tensor of shape ``(B, [C,] *spatial)``.
        masks: Shape ``(B, *spatial)`` or ``(B, 1, *spatial)``.
        weighted: Whether to divide by the base rate ``N / L``: a constant map then scores 1, whatever the size of the
            mask, and the score is in ``[0, L / N]``.

    Returns:
        Scores; the random baseline is ``N / L``, or 1 if weighted.

    Raises:
        TypeError: If ``attributions`` is not a floating tensor or ``masks`` no tensor.
        ValueError: If the shapes do not match.

    Example:
        >>> attribution_localization(torch.tensor([[3.0, 1.0, -4.0, 0.0]]), torch.tensor([[1, 0, 1, 0]])).score
        tensor([0.7500])

    Source:
        Kohlbrenner et al., IJCNN 2020, https://arxiv.org/abs/1910.09840.
    """
    check_bool("weighted", weighted)
    maps, truth = flat_positions(attributions, masks)
    positive = maps.clamp_min(0)
    positive = positive / positive.amax(1, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)  # keeps sums finite
    total, rate = positive.sum(1), count(truth, maps) / maps.shape[1]
    share = torch.where(total > 0, (positive * truth).sum(1) / total, rate)
    share = share.clamp_max(1.0)  # the two sums round differently
    return _defined(share / rate if weighted else share, rate / rate if weighted else rate, maps, truth)


def pointing_game(attributions: Tensor, masks: Tensor, *, tolerance: int = 0) -> LocalizationScores:
    """Tell whether the maximum of the map lies in the mask, within a tolerance.

    Args:
        attributions: Floating tensor of shape ``(B, [C,] *spatial)``.
        masks: Shape ``(B, *spatial)`` or ``(B, 1, *spatial)``.
        tolerance: Number of positions by which the mask is dilated along every spatial dimension.

    Returns:
        0 or 1, or the fraction of tied maxima in the mask; the random baseline is the size of the dilated mask relative
        to all positions.

    Raises:
        TypeError: If ``attributions`` is not a floating tensor, ``masks`` no tensor or ``tolerance`` no int.
        ValueError: If the shapes do not match, or ``tolerance`` is negative.

    Example:
        >>> pointing_game(torch.tensor([[1.0, 3.0, 0.0, 0.0]]), torch.tensor([[1, 0, 0, 0]]), tolerance=1)
        LocalizationScores(score=tensor([1.]), random=tensor([0.5000]))

    Source:
        Zhang et al., IJCV 2018, https://arxiv.org/abs/1608.00507.
    """
    check_non_negative_int("tolerance", tolerance)
    maps, truth = flat_positions(attributions, masks)
    wide = truth
    if tolerance:
        tolerance = min(tolerance, max(masks.shape))
        wide = _dilated(truth.reshape(masks.shape), tolerance).reshape(truth.shape)  # keeps a channel dimension of one
    largest = maps == maps.amax(1, keepdim=True)
    score = count(largest & wide, maps) / count(largest, maps)
    return _defined(score, count(wide, maps) / maps.shape[1], maps, truth)


def attribution_auroc(attributions: Tensor, masks: Tensor) -> LocalizationScores:
    """Area under the ROC curve of the map as a detector of the mask's positions, ties counting one half.

    Args:
        attributions: Floating tensor of shape ``(B, [C,] *spatial)``.
        masks: Shape ``(B, *spatial)`` or ``(B, 1, *spatial)``.

    Returns:
        Scores in ``[0, 1]``; 0.5 for a constant map, the random baseline; NaN for a mask of all positions too.

    Raises:
        TypeError: If ``attributions`` is not a floating tensor or ``masks`` no tensor.
        ValueError: If the shapes do not match.

    Example:
        >>> attribution_auroc(torch.tensor([[3.0, 2.0, 2.0, 0.0]]), torch.tensor([[1, 0, 1, 0]])).score
        tensor([0.8750])

    Source:
        Mann and Whitney, 1947.
    """
    maps, truth = flat_positions(attributions, masks)
    size = count(truth, maps)
    pairs = size * (maps.shape[1] - size)
    score = 0.5 + 0.5 * pairs_in_order(maps, truth).to(maps.dtype) / pairs  # 0 / 0 for a full mask
    return _defined(score, torch.full_like(score, 0.5).where(pairs > 0, torch.nan), maps, truth)


def _defined(score: Tensor, random: Tensor, maps: Tensor, truth: Tensor) -> LocalizationScores:
    usable = torch.isfinite(maps.amax(1)) & torch.isfinite(maps.amin(1)) & truth.any(1)  # both propagate NaN
    kept = (torch.where(usable, part.to(maps.dtype), torch.nan) for part in (score, random))
    return LocalizationScores(*kept)


def _dilated(masks: Tensor, radius: int) -> Tensor:
    """Dilate masks by ``radius`` along each spatial dimension in turn."""
    wide = masks.to(torch.float32)
    for dim in range(1, masks.ndim):
        rows = wide.movedim(dim, -1)
        pooled = F.max_pool1d(rows.reshape(-1, 1, rows.shape[-1]), 2 * radius + 1, stride=1, padding=radius)
        wide = pooled.reshape(rows.shape).movedim(-1, dim)
    return wide > 0
