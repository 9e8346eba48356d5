"""Norms whose second derivative is correct under ``vmap``, or fast.

Under ``vmap(grad(...))`` torch expresses the backward pass of these norms with the saved mean and deviation, as if they
did not depend on the input: the value and the first derivative are correct, the second is silently wrong. Group norm is
not affected. Batch norm with batch statistics is also replaced for speed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins.meta.loop.batch_norm import batch_norm


def _normalized(x: Tensor, dims: list[int], eps: float, *, centred: bool = True) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    if centred:
        wide = wide - wide.mean(dims, keepdim=True)
    return wide * (wide.square().mean(dims, keepdim=True) + eps).rsqrt()


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    x = x if weight is None else x * weight
    return (x if bias is None else x + bias).to(dtype)


def _by_channel(x: Tensor, channels: Tensor | None) -> Tensor | None:
    return None if channels is None else channels.reshape(-1, *[1] * (x.ndim - 2))


def _batch_norm(
    input: Tensor,  # noqa: A002 - the name that callers may use
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training or running_mean is not None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return batch_norm(input, weight, bias, eps)


def _instance_norm(
    input: Tensor,  # noqa: A002 - the name that callers may use
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats or running_mean is not None:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    normalized = _normalized(input, list(range(2, input.ndim)), eps)
    return _scaled(normalized, _by_channel(input, weight), _by_channel(input, bias), input.dtype)


def _layer_norm(
    input: Tensor,  # noqa: A002 - the name that callers may use
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _scaled(_normalized(input, list(range(-len(normalized_shape), 0)), eps), weight, bias, input.dtype)


def _rms_norm(
    input: Tensor,  # noqa: A002 - the name that callers may use
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    dims = list(range(-len(normalized_shape), 0))
    return _scaled(_normalized(input, dims, eps, centred=False), weight, None, input.dtype)


LOOPED: dict[Callable[..., Any], Callable[..., Any]] = {F.batch_norm: _batch_norm}
VECTORIZED: dict[Callable[..., Any], Callable[..., Any]] = {
    **LOOPED,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
}
