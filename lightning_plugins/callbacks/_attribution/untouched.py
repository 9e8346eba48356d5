"""A network that may be hooked, run in parts and asked for gradients, and is afterwards as it was."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def untouched(network: nn.Module) -> Iterator[None]:
    """Evaluate a network with gradients of its inputs, and put back whatever was changed in its modules.

    Inside, the modules are in evaluation mode and parameters take no gradients, which saves their cost; inference mode
    is off and gradients are on. Afterwards every module has the attributes, hooks, modes, parameters and gradients it
    had, also after an error in a method that had its hooks on.

    Args:
        network: The network.

    Yields:
        Nothing.
    """
    kept = {module: _copied(vars(module)) for module in network.modules()}
    grads = [(parameter, parameter.requires_grad, parameter.grad) for parameter in network.parameters()]
    values = {name: value.detach().clone() for name, value in network.named_buffers()}
    try:
        with torch.inference_mode(False), torch.enable_grad():
            network.eval()
            for parameter, _, _ in grads:
                parameter.requires_grad_(False)
            yield
    finally:
        for module, attributes in kept.items():
            vars(module).clear()
            vars(module).update(attributes)
        for parameter, needed, grad in grads:
            parameter.requires_grad_(needed)
            parameter.grad = grad
        with torch.no_grad():
            for name, value in network.named_buffers():
                value.copy_(values[name])


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """Hooks, parameters and children are in dictionaries, which are copied shallowly."""
    return {
        name: type(value)(value) if isinstance(value, dict | OrderedDict) and name.startswith("_") else value
        for name, value in attributes.items()
    }
