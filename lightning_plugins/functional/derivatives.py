"""Errors for missing derivatives, however they are requested.

Torch's ``once_differentiable`` attaches its error only to the incoming gradients. If these are constants, as in
``torch.autograd.grad(y.sum(), x, create_graph=True)``, the results are not connected to the inputs of the function, and
their derivative is silently dropped. Here the error is attached between the results and everything they depend on.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Backward = Callable[..., Any]


def last_derivative(backward: Backward) -> Backward:
    """Make a ``backward`` raise `RuntimeError` when differentiated again, with respect to anything.

    The error is attached between the results and all tensors saved for the backward pass: save every input for which a
    gradient is returned.

    Args:
        backward: The static method of a ``torch.autograd.Function``. It runs without a graph.

    Returns:
        The method to use instead.
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
    """Connect the results of a backward pass computed without a graph to the tensors they depend on.

    Args:
        outputs: The results; None for inputs without a gradient.
        sources: The tensors that they depend on, including incoming gradients.
        what: Subject of the error message.

    Returns:
        The results; a derivative of one for a source raises `RuntimeError`.
    """
    tensors = [output for output in outputs if output is not None]
    if not torch.is_grad_enabled() or not tensors or not any(source.requires_grad for source in sources):
        return tuple(outputs)
    tied = iter(_Refusal.apply(what, len(tensors), *tensors, *sources))
    return tuple(None if output is None else next(tied) for output in outputs)


class _Refusal(Function):
    """The identity on its first tensors, with a backward pass that raises an error."""

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
