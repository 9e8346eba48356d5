"""Derivatives that do not exist: an error where one is asked for, on every way to it.

Torch's own ``once_differentiable`` ties its error to the incoming gradients alone. Where these are constants, as in
``torch.autograd.grad(y.sum(), x, create_graph=True)``, nothing leads from the results to the inputs of the function:
their own derivative is left out without a word. Here the error stands between the results and all they depend on.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Backward = Callable[..., Any]


def last_derivative(backward: Backward) -> Backward:
    """Let a ``backward`` be differentiated no further: that raises `RuntimeError`, whatever it is asked of.

    The error stands between the results and all that was saved for the backward: save every input that a gradient is
    returned for.

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
            return refuse_derivatives((results,), sources, "this derivative, a closed form,")[0]
        return refuse_derivatives(results, sources, "this derivative, a closed form,")

    return wrapper


def refuse_derivatives(
    outputs: Sequence[Tensor | None], sources: Sequence[Tensor], what: str
) -> tuple[Tensor | None, ...]:
    """Return the results of a backward pass that were computed without a graph, tied to what they depend on.

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
    """The identity of its first tensors; an error to the gradient of anything."""

    generate_vmap_rule = True

    @staticmethod
    def forward(what: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.what = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            f"{ctx.what} cannot be differentiated again; look in the documentation of the function for the order up "
            "to which it can, or take an expression of torch's own operations"
        )
