"""Whether attributions say what the model does when its inputs change, sample by sample."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_plugins._checks import (
    check_bool,
    check_callable,
    check_choice,
    check_finite_number,
    check_fraction,
    check_non_negative_int,
    check_positive_int,
)
from lightning_plugins.functional.attribution._positions import (
    checked_maps,
    maps_of_inputs,
    with_channels,
)
from lightning_plugins.functional.attribution.random import (
    random_bits,
    random_normal,
    random_uniform,
    sample_keys,
    split_keys,
)
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
    check_inputs,
    checked_target,
    score_copies,
)

Explain = Callable[[Tensor, Tensor], Tensor]


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
    """Correlate the attribution of random sets of positions with the drop of the score when they are replaced.

    The sets of a sample are drawn from the seed and its contents, so the result does not depend on batches or ranks.

    Args:
        forward: Maps inputs to logits of shape ``(n, classes)``; in evaluation mode.
        inputs: Shape ``(B, [C,] *spatial)``.
        attributions: The same shape, with any number of channels or without that dimension.
        target: Class of each sample, integers of shape ``(B,)``.
        draws: Number of sets of each sample.
        share: Share of the positions in a set, at least one of them.
        perturbation: How they are replaced and the seed of the sets; zeros if None. A ``"mean"`` is that of its whole
            ``patch``, which should be larger than a position.
        output: ``"logit"`` of the class, or its ``"probability"``.
        max_forward_batch: The largest number of inputs in one forward pass.

    Returns:
        Pearson correlations in ``[-1, 1]`` of shape ``(B,)``; NaN where the map or the score does not change from set
        to set. Of a random map the expectation is 0.

    Raises:
        TypeError: If a tensor is of the wrong kind.
        ValueError: If shapes do not go together, an argument is out of its range, or lines are wanted.

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


def infidelity(
    forward: Forward,
    inputs: Tensor,
    attributions: Tensor,
    target: Tensor,
    *,
    draws: int = 10,
    std: float = 0.1,
    normalize: bool = True,
    seed: int = 0,
    output: Output = "logit",
    max_forward_batch: int = MAX_FORWARD_BATCH,
) -> Tensor:
    """Mean squared difference between what attributions predict of noise on the inputs and what the model does.

    With noise ``I`` it is the mean of ``(a . I - (f(x) - f(x - I)))**2``, in squared units of the score; the smaller,
    the better.

    Args:
        forward: Maps inputs to logits of shape ``(n, classes)``; in evaluation mode.
        inputs: Shape ``(B, ...)``.
        attributions: The same shape; a single channel is shared out evenly over several of ``inputs``.
        target: Class of each sample, integers of shape ``(B,)``.
        draws: How often noise is drawn for each sample.
        std: Its standard deviation.
        normalize: Whether each map is first scaled by the factor that fits best: most attributions have no scale of
            their own, and without this the result is ruled by it.
        seed: Of the noise, which is a function of it and of the sample.
        output: ``"logit"`` of the class, or its ``"probability"``.
        max_forward_batch: The largest number of inputs in one forward pass.

    Returns:
        Shape ``(B,)``, at least 0.

    Raises:
        TypeError: If a tensor is of the wrong kind.
        ValueError: If shapes do not go together or an argument is out of its range.

    Example:
        >>> forward = lambda x: torch.stack([3 * x.sum(1), x.sum(1)], 1)
        >>> x = torch.ones(1, 4)
        >>> infidelity(forward, x, torch.full((1, 4), 3.0), torch.tensor([0]), normalize=False) < 1e-9
        tensor([True])

    Source:
        Yeh et al., NeurIPS 2019, https://arxiv.org/abs/1901.09392.
    """
    check_positive_int("draws", draws)
    seed = check_non_negative_int("seed", seed)
    limit = check_positive_int("max_forward_batch", max_forward_batch)
    if check_finite_number("std", std) <= 0:
        raise ValueError(f"`std` must be above 0, got {std!r}")
    check_callable("forward", forward, "a function from inputs to logits")
    check_choice("output", output, OUTPUTS)
    check_bool("normalize", normalize)
    check_inputs(inputs)
    if inputs.dtype == torch.bool:
        raise TypeError("`inputs` must be numbers, to which noise can be added, got torch.bool; convert them")
    x, maps = inputs.detach(), _elementwise(attributions, inputs)
    target, keys = checked_target(target, len(x)).to(x.device), sample_keys(x)
    dots = maps.new_zeros(len(x), draws + 1)

    def make(samples: Tensor, points: Tensor) -> Tensor:
        noise = noise_of(x, keys, samples, points, std, seed)
        noise = noise * (points > 0).to(noise).reshape(-1, *[1] * (x.ndim - 1))
        dots[samples, points] = (maps[samples] * noise).flatten(1).sum(1)
        return (x[samples] - noise.to(x)).to(x)

    scores = score_copies(forward, make, target, draws + 1, limit, output)
    change, predicted = (scores[:, :1] - scores[:, 1:]).to(dots), dots[:, 1:]
    if normalize:
        square = predicted.square().sum(1, keepdim=True)
        factor = (predicted * change).sum(1, keepdim=True) / torch.where(square > 0, square, 1.0)
        predicted = factor * predicted
    return (predicted - change).square().mean(1)


def sensitivity(
    explain: Explain,
    inputs: Tensor,
    target: Tensor,
    *,
    draws: int = 10,
    radius: float = 0.02,
    seed: int = 0,
    max_forward_batch: int = MAX_FORWARD_BATCH,
) -> Tensor:
    """Largest relative change of a map when the input is moved a little: ``max |a(x + d) - a(x)| / |a(x)|``.

    Args:
        explain: Maps inputs and their classes, of shape ``(n,)``, to attributions of shape ``(n, ...)``.
        inputs: Shape ``(B, ...)``.
        target: Class of each sample, integers of shape ``(B,)``.
        draws: How often each input is moved.
        radius: Each of its numbers moves by at most so much, evenly distributed.
        seed: Of the moves, which are a function of it and of the sample.
        max_forward_batch: The largest number of inputs that are explained at once.

    Returns:
        Shape ``(B,)``, at least 0, the smaller the steadier; NaN for a map of zeros.

    Raises:
        TypeError: If a tensor is of the wrong kind.
        ValueError: If shapes do not go together or an argument is out of its range.

    Example:
        >>> sensitivity(lambda x, target: 0 * x + 1, torch.ones(2, 4), torch.tensor([0, 1]))
        tensor([0., 0.])

    Source:
        Yeh et al., NeurIPS 2019, https://arxiv.org/abs/1901.09392.
    """
    check_positive_int("draws", draws)
    seed = check_non_negative_int("seed", seed)
    limit = check_positive_int("max_forward_batch", max_forward_batch)
    if check_finite_number("radius", radius) <= 0:
        raise ValueError(f"`radius` must be above 0, got {radius!r}")
    check_callable("explain", explain, "a function from inputs and classes to maps")
    check_inputs(inputs)
    x = inputs.detach()
    target, keys = checked_target(target, len(x)).to(x.device), sample_keys(x)
    pairs = torch.arange(len(x) * (draws + 1), device=x.device)
    original: Tensor | None = None
    found = []
    # The unmoved copies come first, so that every later part finds its original.
    for part in pairs.split(limit) if len(pairs) else ():
        samples, points = part % len(x), part // len(x)
        noise = (2 * random_uniform(split_keys(keys[samples], points), math.prod(x.shape[1:]), seed=seed) - 1) * radius
        moved = x[samples] + (noise * (points > 0)[:, None]).reshape(x[samples].shape).to(x)
        maps = checked_maps(explain(moved, target[samples]), "explain").flatten(1)
        own = maps[points == 0] if len(part) else maps
        original = own if original is None else torch.cat([original, own])
        found.append((maps - original[samples]).norm(dim=1))
    if original is None:
        return torch.zeros(0, device=x.device)
    largest: Tensor = torch.cat(found).reshape(draws + 1, len(x)).amax(0) / original.norm(dim=1)
    return largest


def noise_of(inputs: Tensor, keys: Tensor, samples: Tensor, draws: Tensor, std: float, seed: int) -> Tensor:
    """Gaussian noise for chosen draws of chosen samples.

    Args:
        inputs: Shape ``(B, ...)``.
        keys: Keys of the samples, shape ``(B,)``.
        samples: Which of them, shape ``(n,)``.
        draws: Which draw of each, shape ``(n,)``.
        std: Standard deviation.
        seed: Of the stream.

    Returns:
        Shape ``(n, ...)``, float32.

    Example:
        >>> noise_of(torch.ones(2, 3), torch.tensor([1, 2]), torch.tensor([0]), torch.tensor([5]), 0.1, seed=0).shape
        torch.Size([1, 3])
    """
    flat = random_normal(split_keys(keys[samples], draws), math.prod(inputs.shape[1:]), seed=seed)
    return std * flat.reshape(len(samples), *inputs.shape[1:])


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlate the rows of two matrices.

    Args:
        a: Shape ``(B, n)``.
        b: Shape ``(B, n)``.

    Returns:
        Shape ``(B,)``, in ``[-1, 1]``; NaN where a row is constant up to rounding, or not finite.

    Example:
        >>> pearson(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0, 4.0, 6.0]])).round(decimals=3)
        tensor([1.])
    """
    centred = []
    for rows in (a, b):
        mean = rows.mean(1, keepdim=True)
        away = rows - mean
        rounding = 8 * torch.finfo(rows.dtype).eps * rows.abs().amax(1, keepdim=True)
        away = torch.where(away.abs().amax(1, keepdim=True) <= rounding, torch.nan, away)
        centred.append(away / away.norm(dim=1, keepdim=True))
    correlation: Tensor = (centred[0] * centred[1]).sum(1).clamp(-1, 1)
    return correlation


def _sets(keys: Tensor, samples: Tensor, points: Tensor, count: int, size: int, seed: int) -> Tensor:
    """Sets of ``size`` of ``count`` positions as bools; draw 0 stands for the unchanged input and is empty."""
    bits = random_bits(split_keys(keys[samples], points), count, seed=seed)
    chosen = torch.zeros(len(samples), count, dtype=torch.bool, device=keys.device)
    chosen.scatter_(1, bits.topk(size, dim=1).indices, True)
    return chosen & (points > 0)[:, None]


def _elementwise(attributions: Tensor, inputs: Tensor) -> Tensor:
    maps = checked_maps(attributions)
    if maps.ndim == inputs.ndim - 1 and inputs.ndim > 2:
        maps = maps.unsqueeze(1)
    if inputs.ndim > 2 and maps.ndim == inputs.ndim and maps.shape[1] == 1:
        maps = (maps / inputs.shape[1]).expand(-1, inputs.shape[1], *maps.shape[2:])
    if maps.shape != inputs.shape:
        raise ValueError(
            f"`attributions` must have the shape {tuple(inputs.shape)} of `inputs`, or one channel, got"
            f" {tuple(attributions.shape)}"
        )
    return maps
