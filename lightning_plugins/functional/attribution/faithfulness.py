"""Correlation of score drops with the attribution of removed positions, over random sets of positions."""

import torch
from torch import Tensor

from lightning_plugins._checks import check_callable, check_choice, check_fraction, check_positive_int
from lightning_plugins.functional.attribution._ordering import pearson
from lightning_plugins.functional.attribution.positions import maps_of_inputs, with_channels
from lightning_plugins.functional.attribution.random import random_bits, sample_keys, split_keys
from lightning_plugins.functional.attribution.replacement import (
    Patches,
    Perturbation,
    checked_perturbation,
    replacements,
)
from lightning_plugins.functional.attribution.scoring import (
    MAX_FORWARD_BATCH,
    OUTPUTS,
    Forward,
    Output,
    checked_target,
    score_copies,
)


def faithfulness_correlation(
    forward: Forward,
    inputs: Tensor,
    attributions: Tensor,
    target: Tensor,
    *,
    draws: int = 100,
    share: float = 0.1,
    perturbation: Perturbation | None = None,
    output: Output = "logit",
    max_forward_batch: int = MAX_FORWARD_BATCH,
) -> Tensor:
    """Correlate the attribution of random sets of positions with the score drop when they are replaced.

    The sets of a sample are drawn from the seed and its contents, so the result does not depend on batches or ranks.

    Args:
        forward: Maps inputs to logits of shape ``(n, classes)``; in evaluation mode.
        inputs: Shape ``(B, [C,] *spatial)``.
        attributions: The same shape, with any number of channels or without that dimension.
        target: Class of each sample, integers of shape ``(B,)``.
        draws: Number of sets per sample.
        share: Fraction of the positions in a set, at least one position.
        perturbation: How they are replaced and the seed of the sets; zeros if None. A ``"mean"`` is that of its whole
            ``patch``, which should be larger than a position.
        output: ``"logit"`` of the class, or its ``"probability"``.
        max_forward_batch: Maximum number of inputs in one forward pass.

    Returns:
        Pearson correlations in ``[-1, 1]`` of shape ``(B,)``; NaN if the map or the score is constant over the sets.
        The expectation for a random map is 0.

    Raises:
        TypeError: If a tensor is of the wrong kind.
        ValueError: If shapes do not match, an argument is out of its range, or the replacement is ``"linear"``.

    Example:
        >>> x = torch.arange(1.0, 9.0).reshape(1, 8)
        >>> forward = lambda x: torch.stack([x.sum(1), 0 * x.sum(1)], 1)
        >>> faithfulness_correlation(forward, x, x, torch.tensor([0]), draws=20, share=0.25)
        tensor([1.])

    Source:
        Bhatt et al., IJCAI 2020, https://arxiv.org/abs/2005.00631.
    """
    check_positive_int("draws", draws)
    limit = check_positive_int("max_forward_batch", max_forward_batch)
    if check_fraction("share", share) == 0:
        raise ValueError("`share` must be above 0, got 0; a tenth of the positions is usual")
    check_callable("forward", forward, "a function from inputs to logits")
    check_choice("output", output, OUTPUTS)
    how = checked_perturbation(perturbation, Perturbation(patch=1, replacement="zero"))
    if how.replacement == "linear":
        raise ValueError(
            "`replacement='linear'` replaces windows, and sets have single positions; take 'zero' or 'min'"
        )
    maps, x = maps_of_inputs(attributions, inputs), with_channels(inputs.detach())
    target, keys = checked_target(target, len(x)).to(x.device), sample_keys(x)
    flat = maps.flatten(1)
    size = max(1, round(share * flat.shape[1]))
    replaced = replacements(x, how, Patches(tuple(x.shape[2:]), how.patch, x.device), keys)
    sums = flat.new_zeros(len(x), draws + 1)

    def make(samples: Tensor, points: Tensor) -> Tensor:
        chosen = _sets(keys, samples, points, flat.shape[1], size, how.seed)
        sums[samples, points] = (flat[samples] * chosen).sum(1)
        gone = chosen.reshape(-1, 1, *x.shape[2:])
        copies = torch.where(gone, replaced[samples], x[samples])
        return copies[:, 0] if inputs.ndim == 2 else copies

    scores = score_copies(forward, make, target, draws + 1, limit, output)
    return pearson(sums[:, 1:], (scores[:, :1] - scores[:, 1:]).to(sums))


def _sets(keys: Tensor, samples: Tensor, points: Tensor, count: int, size: int, seed: int) -> Tensor:
    """Sets of ``size`` of ``count`` positions as bools; draw 0 is the unchanged input and is empty."""
    bits = random_bits(split_keys(keys[samples], points), count, seed=seed)
    chosen = torch.zeros(len(samples), count, dtype=torch.bool, device=keys.device)
    chosen.scatter_(1, bits.topk(size, dim=1).indices, True)
    return chosen & (points > 0)[:, None]
