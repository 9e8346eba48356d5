"""Evaluation of the model and the loss on one task's batch, with given parameters."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_plugins.meta.loop.structure import leaves
from lightning_plugins.meta.preconditioners import few

Loss = Callable[..., Tensor]
Parameters = dict[str, Tensor]


class Measure:
    """Calls the model and the loss.

    Args:
        model: The model.
        loss: The loss; it also receives ``parameters``, ``initial`` and ``step`` if it has arguments of these names.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self.model, self.loss = model, loss
        self.wanted = named_arguments(loss, ("parameters", "initial", "step"))

    def outputs(self, parameters: Parameters, inputs: Any) -> Tensor:
        """The model's outputs; parameters that are not given are its own, and buffers are copies of its own."""
        # The model is not changed: buffers written in a forward pass, such as counters, are copies.
        copies = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, Mapping) else (inputs,)
        kwargs = dict(inputs) if isinstance(inputs, Mapping) else None
        try:
            outputs = functional_call(self.model, {**copies, **parameters}, args, kwargs)
        except Exception as error:
            error.add_note(f"`model` was given the inputs of one task, {_shown(inputs)}")
            raise
        if not isinstance(outputs, Tensor):
            raise TypeError(f"`model` must return a tensor, got {type(outputs).__name__}")
        return outputs

    def __call__(self, parameters: Parameters, batch: Sequence[Any], given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The loss and the outputs; ``given`` has the optional arguments of a loss."""
        outputs = self.outputs(parameters, batch[0])
        try:
            value = self.loss(outputs, batch[1], **{name: given[name] for name in self.wanted})
        except Exception as error:
            error.add_note(f"`loss` was given one task's outputs, {_shown(outputs)}, and targets, {_shown(batch[1])}")
            raise
        if not isinstance(value, Tensor):
            raise TypeError(f"`loss` must return a scalar tensor, got {type(value).__name__}")
        if value.ndim:
            raise ValueError(
                f"`loss` must return a scalar for the samples of one task, got shape {tuple(value.shape)};"
                " reduce it, as `reduction='mean'` does"
            )
        return value, outputs


def named_arguments(function: Callable[..., Any], names: Sequence[str]) -> tuple[str, ...]:
    """Return the names that are arguments of a function or of a module's forward pass."""
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):  # some built-in functions have no signature
        return ()
    return tuple(name for name in names if name in signature.parameters)


class Given(NamedTuple):
    """Optional arguments of a loss or a preconditioner, passed by name."""

    parameters: Parameters
    initial: Parameters
    step: int | None


def plain_gradient(
    value: Callable[[Parameters], tuple[Tensor, tuple[Tensor, ...]]], parameters: Parameters, *, differentiable: bool
) -> tuple[Parameters, tuple[Tensor, ...]]:
    """Like ``torch.func.grad(value, has_aux=True)``, without its overhead for small operations."""
    differentiable = differentiable and torch.is_grad_enabled()
    with torch.enable_grad():
        free = {
            name: parameter if differentiable and parameter.requires_grad else parameter.detach().requires_grad_()
            for name, parameter in parameters.items()
        }
        loss, others = value(free)
        found = torch.autograd.grad(
            loss, list(free.values()), create_graph=differentiable, allow_unused=True, materialize_grads=True
        )
    return dict(zip(free, found, strict=True)), others


def check_used(measure: Measure, parameters: Parameters, support: Sequence[Any]) -> None:
    """Raise an error for adapted parameters that the loss does not depend on: they would silently never adapt."""
    device = leaves(support[0])[0].device
    with torch.enable_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        free = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
        value, _ = measure(free, support, Given(free, free, 0)._asdict())
        found: Sequence[Tensor | None] = [None] * len(free)
        if value.requires_grad:
            found = torch.autograd.grad(value, list(free.values()), allow_unused=True)
    if unused := [name for name, gradient in zip(free, found, strict=True) if gradient is None]:
        raise ValueError(
            f"the support loss must depend on all adapted parameters, it does not on {few(unused)};"
            " name the layers that adapt with `layers`, or freeze these with `requires_grad_(False)`"
        )


def _shown(value: Any) -> str:
    return " and ".join(f"{tensor.dtype} of shape {tuple(tensor.shape)}" for tensor in leaves(value))
