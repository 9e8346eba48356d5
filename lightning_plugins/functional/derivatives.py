"""Derivatives that end: a backward that is no graph of operations says so when it is differentiated again."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Backward = Callable[..., Any]


def last_derivative(backward: Backward) -> Backward:
    """Let a ``backward`` be differentiated no further: that raises `RuntimeError`, whatever it is asked of.

    Torch's own ``once_differentiable`` ties its error to the incoming gradients alone. With ``torch.autograd.grad``
    nothing leads from there to the inputs of the function, so that its part is left out without a word, and a second
    derivative is wrong. Here the error stands between the results and all that was saved for the backward: save every
    input that a gradient is returned for.

    Args:
        backward: The static method of a ``torch.autograd.Function``. It runs without a graph.

    Returns:
        The method to use in its place.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        sources = [tensor for tensor in (*ctx.saved_tensors, *grads) if isinstance(tensor, Tensor)]
        if isinstance(results, Tensor):
            return _End.apply(results, *sources)
        return tuple(_End.apply(each, *sources) if isinstance(each, Tensor) else each for each in results)

    return wrapper


class _End(Function):
    """The identity of its first argument; an error to the gradient of anything."""

    generate_vmap_rule = True

    @staticmethod
    def forward(result: Tensor, *sources: Tensor) -> Tensor:
        return result.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            "this derivative is a closed form that can't be differentiated again; look in the documentation of the "
            "function for the order up to which it can, or take an expression of torch's own operations"
        )
