"""The model and the loss on one task's batch, with given parameters."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_plugins.meta.preconditioners import few

Loss = Callable[[Tensor, Tensor], Tensor]
Parameters = dict[str, Tensor]


def outputs_of(model: nn.Module, parameters: Parameters, inputs: Tensor) -> Tensor:
    """The model's outputs; parameters that are not given are its own."""
    try:
        outputs = functional_call(model, parameters, (inputs,))
    except Exception as error:
        error.add_note(f"`model` was given the inputs of one task, {_shown(inputs)}")
        raise
    if not isinstance(outputs, Tensor):
        raise TypeError(f"`model` must return a tensor, got {type(outputs).__name__}")
    return outputs


def measure(model: nn.Module, loss: Loss, parameters: Parameters, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The loss and the outputs."""
    outputs = outputs_of(model, parameters, batch[0])
    try:
        value = loss(outputs, batch[1])
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


def plain_gradient(
    value: Callable[[Parameters], tuple[Tensor, tuple[Tensor, ...]]], parameters: Parameters, *, differentiable: bool
) -> tuple[Parameters, tuple[Tensor, ...]]:
    """What ``torch.func.grad(value, has_aux=True)`` returns, without the time it takes to trace small operations."""
    differentiable = differentiable and torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = {
            name: parameter if differentiable and parameter.requires_grad else parameter.detach().requires_grad_()
            for name, parameter in parameters.items()
        }
        loss, others = value(leaves)
        found = torch.autograd.grad(
            loss, list(leaves.values()), create_graph=differentiable, allow_unused=True, materialize_grads=True
        )
    return dict(zip(leaves, found, strict=True)), others


def check_used(model: nn.Module, loss: Loss, parameters: Parameters, support: Sequence[Tensor]) -> None:
    """Refuse adapted parameters without part in the first task's loss: they never adapt, and nothing else says so."""
    devices = [support[0].device] if support[0].is_cuda else []
    with torch.enable_grad(), torch.random.fork_rng(devices):
        leaves = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
        value, _ = measure(model, loss, leaves, [tensor[0].detach() for tensor in support])
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if value.requires_grad:
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    if unused := [name for name, gradient in zip(leaves, found, strict=True) if gradient is None]:
        raise ValueError(
            f"the support loss must depend on all adapted parameters, it does not on {few(unused)};"
            " name the layers that adapt with `layers`, or freeze these with `requires_grad_(False)`"
        )


def _shown(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
