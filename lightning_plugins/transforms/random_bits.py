"""Random numbers that are a function of a key, the same on every device and in every batch."""

from collections.abc import Mapping

import torch
from torch import Tensor

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def mix(bits: Tensor) -> Tensor:
    """Scramble int64 numbers (the finaliser of SplitMix64); arithmetic wraps."""
    bits = (bits ^ _shift(bits, 30)) * _FIRST
    bits = (bits ^ _shift(bits, 27)) * _SECOND
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, by: int) -> Tensor:
    return torch.bitwise_and(bits >> by, 2 ** (64 - by) - 1)  # logical shift: no sign extension


def sample_keys(batch: Mapping[str, Tensor], seed: int, step: int) -> Tensor:
    """Compute a key for each sample of a batch from its ``index``, or from its points without padding."""
    if "index" in batch:
        own = batch["index"].long()
    else:
        bits = batch["points"][..., :3].float().contiguous().view(torch.int32).long()
        place = torch.arange(bits.shape[1], device=bits.device)[:, None] * 3 + torch.arange(3, device=bits.device)
        own = (mix(bits + place * _GOLDEN) * batch["mask"][..., None]).sum((1, 2))
    return mix(mix(own + _wrapped(seed * _GOLDEN)) + _wrapped(step * _FIRST))


def _wrapped(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63  # wraps like int64 arithmetic; a longer int does not fit into a tensor


def uniform(keys: Tensor, stream: int, count: int) -> Tensor:
    """Return ``count`` numbers in [0, 1) per key, float32 of shape ``(B, count)``."""
    counters = torch.arange(count, device=keys.device) + (stream + 1) * 2**20
    return _shift(mix(keys[:, None] + counters * _GOLDEN), 40).float() / 2**24
