"""An error where a derivative that does not exist is asked for, on every way to it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def refuse_derivatives(
    outputs: Sequence[Tensor | None], sources: Sequence[Tensor], what: str
) -> tuple[Tensor | None, ...]:
    """Return the results of a backward pass that were computed without a graph, tied to what they depend on.

    `torch.autograd.function.once_differentiable` only looks at the gradient that comes in: where that is a constant,
    as in ``torch.autograd.grad(y.sum(), x, create_graph=True)``, the results look like constants too, and their own
    derivative is silently wrong.

    Args:
        outputs: The results; None for inputs without a gradient.
        sources: The tensors that they depend on, incoming gradients included.
        what: What can't be differentiated further, to begin the error's message.

    Returns:
        The results; a derivative of one for a source raises `RuntimeError`.
    """
    tensors = [output for output in outputs if output is not None]
    if not torch.is_grad_enabled() or not tensors or not any(source.requires_grad for source in sources):
        return tuple(outputs)
    tied = iter(_Refusal.apply(what, len(tensors), *tensors, *sources))
    return tuple(None if output is None else next(tied) for output in outputs)


class _Refusal(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(what: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.what = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(f"{ctx.what} cannot be differentiated once more")
