"""Change of attributions under small changes of the inputs."""

import math

import torch
from torch import Tensor

from lightning_plugins._checks import check_callable, check_finite_number, check_non_negative_int, check_positive_int
from lightning_plugins.functional.attribution.positions import checked_maps
from lightning_plugins.functional.attribution.random import random_uniform, sample_keys, split_keys
from lightning_plugins.functional.attribution.scoring import MAX_FORWARD_BATCH, Explain, check_inputs, checked_target


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
    """Largest relative change of a map under small changes of the input: ``max |a(x + d) - a(x)| / |a(x)|``.

    Args:
        explain: Maps inputs and their classes, of shape ``(n,)``, to attributions of shape ``(n, ...)``.
        inputs: Shape ``(B, ...)``.
        target: Class of each sample, integers of shape ``(B,)``.
        draws: Number of perturbations per input.
        radius: Maximum change of each value, uniformly distributed.
        seed: Seed of the perturbations, which depend on it and on the sample.
        max_forward_batch: Maximum number of inputs that are explained at once.

    Returns:
        Shape ``(B,)``, at least 0, lower is more stable; NaN for a map of zeros.

    Raises:
        TypeError: If a tensor is of the wrong kind.
        ValueError: If shapes do not match or an argument is out of its range.

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
    # The unchanged copies come first, so that every later chunk can use its original.
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
