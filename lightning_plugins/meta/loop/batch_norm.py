"""Batch norm with batch statistics, whose second derivative needs only a few passes over the values."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_plugins.functional.derivatives import refuse_derivatives
from lightning_plugins.functional.spectrum import full_precision


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise the channels of ``(samples, channels, ...)``; twice differentiable, including under ``vmap``."""
    # The second derivative of torch's batch norm is a long chain of elementary operations on all values, which took a
    # third of the time of a second-order inner loop with four convolutions; and under ``vmap(grad(...))`` it is wrong.
    wide = x if x.dtype == torch.float64 else x.float()
    weight = wide.new_ones(x.shape[1]) if weight is None else weight.to(wide.dtype)
    bias = wide.new_zeros(x.shape[1]) if bias is None else bias.to(wide.dtype)
    with full_precision(wide):
        flat = wide.reshape(*x.shape[:2], -1)  # (samples, channels, places)
        result: Tensor = _Normalise.apply(flat, weight, bias, eps)[0]
    return result.reshape(x.shape).to(x.dtype)


# Below, x is (..., samples, channels, positions), and per-channel quantities are (..., channels), with the same leading
# dimensions. With z = r (x - mean) the value is w z + b.


class _Normalise(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        mean = _sums(x) / _count(x)
        centred = x - _spread(mean)
        rate = (_dots(centred, centred) / _count(x) + eps).rsqrt()
        return centred.mul_(_spread(weight * rate)).add_(_spread(bias)), mean, rate

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2], *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        return *_Backward.apply(grad, *ctx.saved_tensors), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[tuple[Tensor, ...], int]:
        return _Normalise.apply(*_in_front(info.batch_size, in_dims, (x, weight, bias)), eps), 0


class _Backward(Function):
    @staticmethod
    def forward(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count, total = _count(x), _sums(grad)
        along = rate * (_dots(grad, x) - mean * total)  # the sum of grad z
        scale = weight * rate
        slope = -scale * rate * along / count
        return _combined(grad, scale, x, slope, -scale * total / count - slope * mean), along, total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, x, weight, mean, rate, along, total = ctx.saved_tensors
        with torch.no_grad(), full_precision(x):
            count = _count(x)
            v, for_weight, for_bias = (
                like.new_zeros(like.shape) if given is None else given
                for given, like in zip(grads, (x, weight, weight), strict=True)
            )
            # The means of: grad, grad z, v, v z, v grad.
            a, b, c = total / count, along / count, _sums(v) / count
            d = rate * (_dots(v, x) / count - mean * c)
            e = _dots(v, grad) / count
            scale = weight * rate
            # Each result is a combination of grad, v and z; the z part is split into an x part and a constant.
            by_z = for_weight - scale * d
            for_grad = _combined(v, scale, x, by_z * rate, for_bias - scale * c - by_z * rate * mean)
            by_grad, by_v = rate * by_z, -rate * scale * b
            by_z = -rate * (for_weight * b + scale * (e - a * c - 3 * b * d))
            constant = rate * (scale * (d * a + b * c) - for_weight * a) - by_z * rate * mean
            for_x = _combined(grad, by_grad, x, by_z * rate, constant)
            for_x.addcmul_(v, _spread(by_v))
            results = (for_grad, for_x, rate * count * (e - a * c - b * d))
        sources = (grad, x, weight, *(given for given in grads if given is not None))
        return *refuse_derivatives(results, sources, "batch norm in an inner loop: the second derivative"), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[tuple[Tensor, ...], int]:
        return _Backward.apply(*_in_front(info.batch_size, in_dims, tensors)), 0


def _combined(first: Tensor, factor: Tensor, second: Tensor, other: Tensor, constant: Tensor) -> Tensor:
    # At most one operand without a stride along the positions: otherwise torch does not use vector instructions.
    return (second * _spread(other)).add_(_spread(constant)).addcmul_(first, _spread(factor))


def _spread(channels: Tensor) -> Tensor:
    return channels[..., None, :, None]


def _count(x: Tensor) -> int:
    return x.shape[-3] * x.shape[-1]


def _sums(x: Tensor) -> Tensor:
    """Sums over samples and positions."""
    return x.sum(-1).sum(-2)


def _dots(first: Tensor, second: Tensor) -> Tensor:
    """Sums of products over samples and positions."""
    products: Tensor = torch.linalg.vecdot(first, second)
    return products.sum(-2)


def _in_front(size: int, dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(
        tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, dims, strict=False)
    )
