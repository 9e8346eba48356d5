"""Random numbers tied to a sample, independent of batch, rank and device.

Every number is a function of a seed, the sample's key and its own position (a counter passed through SplitMix64), so it
does not depend on batching, order or device.
"""

import math

import torch
from torch import Tensor

from lightning_plugins._checks import check_int
from lightning_plugins.functional.tensors import check_dims, check_real

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as signed integers: torch's int64 wraps around like an unsigned type
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_SHIFTS = (30, 27, 31)


def sample_keys(inputs: Tensor) -> Tensor:
    """Compute a key for each sample from its contents.

    Args:
        inputs: Tensor of shape ``(B, ...)``; floating numbers are converted to float32.

    Returns:
        int64 tensor of shape ``(B,)``; equal samples have equal keys.

    Example:
        >>> keys = sample_keys(torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]]))
        >>> bool(keys[0] == keys[2]), bool(keys[0] == keys[1])
        (True, False)
    """
    flat = inputs.detach().unsqueeze(-1).flatten(1)  # a row of numbers per sample, possibly without samples
    bits = flat.float().contiguous().view(torch.int32).long() if flat.is_floating_point() else flat.long()
    weights = _mix(torch.arange(1, bits.shape[1] + 1, device=bits.device) * _GOLDEN) | 1
    return _mix((bits * weights).sum(1))


def split_keys(keys: Tensor, number: Tensor | int) -> Tensor:
    """Derive separate keys for several draws of a sample.

    Args:
        keys: int64 tensor of shape ``(n,)``.
        number: Index of the draw: an int, or integers of shape ``(n,)``.

    Returns:
        int64 tensor of shape ``(n,)``.

    Example:
        >>> bool((split_keys(torch.tensor([3]), 0) == split_keys(torch.tensor([3]), 1)).any())
        False
    """
    step = (number + 1) * _GOLDEN
    return _mix(keys + (_wrapped(step) if isinstance(step, int) else step))


def random_bits(keys: Tensor, count: int, *, seed: int, offset: int = 0) -> Tensor:
    """Draw integers of 64 random bits.

    Args:
        keys: int64 tensor of shape ``(B,)``.
        count: Number of draws per sample.
        seed: Number of the stream.
        offset: Index of the first draw: draws ``offset`` to ``offset + count - 1`` of an infinite sequence.

    Returns:
        int64 tensor of shape ``(B, count)``.

    Example:
        >>> keys = torch.tensor([3, 4])
        >>> bool((random_bits(keys, 3, seed=0)[:, 1:] == random_bits(keys, 2, seed=0, offset=1)).all())
        True
    """
    counters = torch.arange(offset + 1, offset + count + 1, device=keys.device) * _GOLDEN
    return _mix(_mix(keys + _wrapped((seed + 1) * 0x5851F42D4C957F2D))[:, None] + counters)


def random_uniform(keys: Tensor, count: int, *, seed: int, offset: int = 0) -> Tensor:
    """Draw numbers between 0 and 1.

    Args:
        keys: int64 tensor of shape ``(B,)``.
        count: Number of draws per sample.
        seed: Number of the stream.
        offset: Index of the first draw.

    Returns:
        float32 tensor of shape ``(B, count)``, within ``(0, 1)``.

    Example:
        >>> bool((random_uniform(torch.tensor([3]), 1000, seed=0).mean() - 0.5).abs() < 0.05)
        True
    """
    bits = (random_bits(keys, count, seed=seed, offset=offset) >> 41) & (2**23 - 1)
    return (bits.float() + 0.5) / 2**23


def random_normal(keys: Tensor, count: int, *, seed: int, offset: int = 0) -> Tensor:
    """Draw from a normal distribution with the Box-Muller transform.

    Args:
        keys: int64 tensor of shape ``(B,)``.
        count: Number of draws per sample.
        seed: Number of the stream.
        offset: Index of the first draw.

    Returns:
        float32 tensor of shape ``(B, count)``, of mean 0 and standard deviation 1.

    Example:
        >>> bool((random_normal(torch.tensor([3]), 1000, seed=0).std() - 1).abs() < 0.1)
        True
    """
    radius = random_uniform(keys, count, seed=2 * seed, offset=offset).log().mul(-2).sqrt()
    angle = 2 * math.pi * random_uniform(keys, count, seed=2 * seed + 1, offset=offset)
    return radius * angle.cos()


def random_attributions(inputs: Tensor, *, seed: int = 0) -> Tensor:
    """Draw a random map, which is independent of the model: the baseline of every score.

    Args:
        inputs: Tensor of shape ``(B, [C,] *spatial)``.
        seed: Seed of the map.

    Returns:
        Standard normal numbers of shape ``(B, *spatial)`` (``(B, L)`` for inputs without channels), the same for the
        same sample in any batch.

    Example:
        >>> random_attributions(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 8])
    """
    check_real("inputs", inputs)
    check_dims("inputs", inputs, 2, "(B, [C,] *spatial)")
    seed = check_int("seed", seed)
    spatial = inputs.shape[2:] if inputs.ndim > 2 else inputs.shape[1:]
    return random_normal(sample_keys(inputs), math.prod(spatial), seed=seed + 1000).reshape(len(inputs), *spatial)


def _wrapped(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


def _mix(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64; arithmetic shifts of negative int64 insert ones, which are masked out."""
    for shift, factor in zip(_SHIFTS, (*_FACTORS, 1), strict=True):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x
