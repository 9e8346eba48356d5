"""Masks in [0, 1] from real scores: annealed sigmoid, hard concrete and straight-through; positive means open."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_plugins._checks import check_finite_number
from lightning_plugins.functional.tensors import check_floating, check_together


def annealed_sigmoid(scores: Tensor, beta: Tensor | float = 1.0) -> Tensor:
    """``sigmoid(beta * scores)``: soft at first, a step at zero as ``beta`` grows.

    Args:
        scores: Floating tensor of any shape.
        beta: The inverse temperature, positive: a number, or a tensor that broadcasts.

    Returns:
        Tensor of the shape of ``scores``, in [0, 1]. Value and gradient are finite for every finite ``beta * scores``
        and on overflow.

    Raises:
        TypeError: If ``scores`` is not a real floating tensor.
        ValueError: If ``beta`` is a number that is not positive.

    Example:
        >>> annealed_sigmoid(torch.tensor([-1.0, 0.0, 1.0]), beta=200.0)
        tensor([0.0000, 0.5000, 1.0000])

    Source:
        Savarese et al., Continuous Sparsification, NeurIPS 2020, https://arxiv.org/abs/1912.04427.
    """
    check_floating("scores", scores)
    _check_beta(beta, scores)
    return torch.sigmoid(beta * scores)


def straight_through(scores: Tensor, beta: Tensor | float = 1.0) -> Tensor:
    """1 where a score is positive and 0 elsewhere, with the gradient of `annealed_sigmoid`.

    Args:
        scores: Floating tensor of any shape.
        beta: The inverse temperature of the gradient, positive.

    Returns:
        Tensor of zeros and ones of the shape of ``scores``. It can be differentiated once.

    Raises:
        TypeError: If ``scores`` is not a real floating tensor.
        ValueError: If ``beta`` is a number that is not positive.

    Example:
        >>> straight_through(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0., 0., 1.])

    Source:
        Bengio et al., 2013, https://arxiv.org/abs/1308.3432.
    """
    check_floating("scores", scores)
    _check_beta(beta, scores)
    mask: Tensor = _Step.apply(scores, torch.as_tensor(beta, dtype=scores.dtype, device=scores.device))
    return mask


def hard_concrete(
    scores: Tensor,
    noise: Tensor | None = None,
    *,
    temperature: float = 2 / 3,
    low: float = -0.1,
    high: float = 1.1,
) -> Tensor:
    """A mask that is exactly 0 or 1 with positive probability, and differentiable in between.

    With noise ``u``: ``sigmoid((ln u - ln(1 - u) + scores) / temperature)``, stretched to ``[low, high]`` and clipped
    to ``[0, 1]``; without noise ``sigmoid(scores)``, stretched and clipped likewise.

    Args:
        scores: Floating tensor of any shape: log odds.
        noise: Tensor of the same shape, uniform in ``[0, 1]``; None for the evaluation mask.
        temperature: Positive.
        low: The lower end before clipping, below 0.
        high: The upper end before clipping, above 1.

    Returns:
        Tensor of the shape of ``scores``, in [0, 1].

    Raises:
        TypeError: If ``scores`` is not a real floating tensor.
        ValueError: If ``noise`` has another shape, or a number is outside of its range.

    Example:
        >>> hard_concrete(torch.tensor([-4.0, 0.0, 4.0]))
        tensor([0.0000, 0.5000, 1.0000])

    Source:
        Louizos, Welling and Kingma, ICLR 2018, https://arxiv.org/abs/1712.01312.
    """
    check_floating("scores", scores)
    _check_stretch(temperature, low, high)
    if noise is None:
        gate = torch.sigmoid(scores)
    else:
        check_floating("noise", noise)
        if noise.shape != scores.shape:
            raise ValueError(f"`noise` must have the shape of `scores` {tuple(scores.shape)}, got {tuple(noise.shape)}")
        least = torch.finfo(scores.dtype).eps
        gate = torch.sigmoid((torch.logit(noise, eps=least) + scores) / temperature)
    return (gate * (high - low) + low).clamp(0, 1)


def hard_concrete_open(scores: Tensor, *, temperature: float = 2 / 3, low: float = -0.1, high: float = 1.1) -> Tensor:
    """The probability that `hard_concrete` is not zero: ``sigmoid(scores - temperature * ln(-low / high))``.

    Args:
        scores: Floating tensor of any shape.
        temperature: As for `hard_concrete`.
        low: As for `hard_concrete`.
        high: As for `hard_concrete`.

    Returns:
        Tensor of the shape of ``scores``, in [0, 1].

    Raises:
        TypeError: If ``scores`` is not a real floating tensor.
        ValueError: If a number is outside of its range.

    Example:
        >>> hard_concrete_open(torch.tensor([0.0]))
        tensor([0.8318])

    Source:
        Louizos, Welling and Kingma, ICLR 2018, https://arxiv.org/abs/1712.01312.
    """
    check_floating("scores", scores)
    _check_stretch(temperature, low, high)
    return torch.sigmoid(scores - temperature * math.log(-low / high))


def _check_beta(beta: Tensor | float, scores: Tensor) -> None:
    if isinstance(beta, Tensor):
        check_floating("beta", beta)
        if beta.ndim:
            check_together("beta", beta.shape, "scores", scores.shape)
        return
    if check_finite_number("beta", beta) <= 0:
        raise ValueError(f"`beta` must be positive, got {beta!r}")


def _check_stretch(temperature: float, low: float, high: float) -> None:
    if check_finite_number("temperature", temperature) <= 0:
        raise ValueError(f"`temperature` must be positive, got {temperature!r}")
    if check_finite_number("low", low) >= 0:
        raise ValueError(f"`low` must be below 0, or no mask is ever zero, got {low!r}")
    if check_finite_number("high", high) <= 1:
        raise ValueError(f"`high` must be above 1, or no mask is ever one, got {high!r}")


class _Step(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor, beta: Tensor) -> Tensor:
        return (scores > 0).to(scores.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        scores, beta = ctx.saved_tensors
        soft = torch.sigmoid(beta * scores)
        return grad * beta * soft * (1 - soft), None
