"""Error of attributions as predictions of the effect of noise on the score."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_plugins._checks import (
    check_bool,
    check_callable,
    check_choice,
    check_non_negative_int,
    check_positive_int,
    check_positive_number,
)
from lightning_plugins._grouping import Group, grouped
from lightning_plugins.functional.attribution.positions import checked_maps
from lightning_plugins.functional.attribution.random import random_normal, sample_keys, split_keys
from lightning_plugins.functional.attribution.scoring import (
    MAX_FORWARD_BATCH,
    OUTPUTS,
    Forward,
    Output,
    check_inputs,
    checked_target,
    score_copies,
)


@dataclass(frozen=True, kw_only=True)
class NoiseDraws:
    """Gaussian noise that is added to inputs, to score attributions as predictions of its effect.

    Attributes:
        count: Number of draws per sample, at least 1.
        std: Standard deviation of the noise, above 0.
        seed: Seed of the noise, which depends on it and on the sample.

    Raises:
        TypeError: If a field is of the wrong type.
        ValueError: If a field is out of its range.

    Example:
        >>> NoiseDraws(count=20, std=0.2)
        NoiseDraws(count=20, std=0.2, seed=0)
    """

    count: int = 10
    std: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", check_positive_int("count", self.count))
        object.__setattr__(self, "seed", check_non_negative_int("seed", self.seed))
        object.__setattr__(self, "std", check_positive_number("std", self.std))


def as_noise(draws: int | NoiseDraws) -> NoiseDraws:
    """Return the noise that an argument ``draws`` stands for."""
    return draws if isinstance(draws, NoiseDraws) else NoiseDraws(count=check_positive_int("draws", draws))


@grouped(draws=Group(NoiseDraws, main="count"))
def infidelity(
    forward: Forward,
    inputs: Tensor,
    attributions: Tensor,
    target: Tensor,
    *,
    draws: int | NoiseDraws = 10,
    normalize: bool = True,
    output: Output = "logit",
    max_forward_batch: int = MAX_FORWARD_BATCH,
) -> Tensor:
    """Mean squared error of attributions as predictions of the effect of input noise on the score.

    With noise ``I`` it is the mean of ``(a . I - (f(x) - f(x - I)))**2``, in squared units of the score; lower is
    better.

    Args:
        forward: Maps inputs to logits of shape ``(n, classes)``; in evaluation mode.
        inputs: Shape ``(B, ...)``.
        attributions: The same shape; a single channel is distributed evenly over the channels of ``inputs``.
        target: Class of each sample, integers of shape ``(B,)``.
        draws: Number of noise draws per sample; `NoiseDraws` also has the standard deviation, by default 0.1, and the
            seed of the noise.
        normalize: Whether to scale each map by the best-fitting factor first: the scale of most attributions is
            arbitrary and would dominate the result.
        output: ``"logit"`` of the class, or its ``"probability"``.
        max_forward_batch: Maximum number of inputs in one forward pass.

    Returns:
        Shape ``(B,)``, at least 0.

    Raises:
        TypeError: If a tensor is of the wrong kind.
        ValueError: If shapes do not match or an argument is out of its range.

    Example:
        >>> forward = lambda x: torch.stack([3 * x.sum(1), x.sum(1)], 1)
        >>> x = torch.ones(1, 4)
        >>> infidelity(forward, x, torch.full((1, 4), 3.0), torch.tensor([0]), normalize=False) < 1e-9
        tensor([True])

    Source:
        Yeh et al., NeurIPS 2019, https://arxiv.org/abs/1901.09392.
    """
    drawn = as_noise(draws)
    limit = check_positive_int("max_forward_batch", max_forward_batch)
    check_callable("forward", forward, "a function from inputs to logits")
    check_choice("output", output, OUTPUTS)
    check_bool("normalize", normalize)
    check_inputs(inputs)
    if inputs.dtype == torch.bool:
        raise TypeError("`inputs` must be numbers, to which noise can be added, got torch.bool; convert them")
    x, maps = inputs.detach(), _elementwise(attributions, inputs)
    target, keys = checked_target(target, len(x)).to(x.device), sample_keys(x)
    dots = maps.new_zeros(len(x), drawn.count + 1)

    def make(samples: Tensor, points: Tensor) -> Tensor:
        noise = noise_of(x, keys, samples, points, drawn.std, drawn.seed)
        noise = noise * (points > 0).to(noise).reshape(-1, *[1] * (x.ndim - 1))
        dots[samples, points] = (maps[samples] * noise).flatten(1).sum(1)
        return (x[samples] - noise.to(x)).to(x)

    scores = score_copies(forward, make, target, drawn.count + 1, limit, output)
    change, predicted = (scores[:, :1] - scores[:, 1:]).to(dots), dots[:, 1:]
    if normalize:
        square = predicted.square().sum(1, keepdim=True)
        factor = (predicted * change).sum(1, keepdim=True) / torch.where(square > 0, square, 1.0)
        predicted = factor * predicted
    return (predicted - change).square().mean(1)


def noise_of(inputs: Tensor, keys: Tensor, samples: Tensor, draws: Tensor, std: float, seed: int) -> Tensor:
    """Gaussian noise for chosen draws of chosen samples.

    Args:
        inputs: Shape ``(B, ...)``.
        keys: Keys of the samples, shape ``(B,)``.
        samples: Indices of samples, shape ``(n,)``.
        draws: Index of the draw for each, shape ``(n,)``.
        std: Standard deviation.
        seed: Seed of the stream.

    Returns:
        Shape ``(n, ...)``, float32.

    Example:
        >>> noise_of(torch.ones(2, 3), torch.tensor([1, 2]), torch.tensor([0]), torch.tensor([5]), 0.1, seed=0).shape
        torch.Size([1, 3])
    """
    flat = random_normal(split_keys(keys[samples], draws), math.prod(inputs.shape[1:]), seed=seed)
    return std * flat.reshape(len(samples), *inputs.shape[1:])


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
