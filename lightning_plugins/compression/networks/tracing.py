"""Torch-Pruning's graph of one forward pass."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.compression.networks.quantized import is_quantized


def trace(model: nn.Module, inputs: Any) -> Any:
    """Follow a model's channels through one forward pass.

    Args:
        model: The model.
        inputs: A tensor, a tuple of arguments or a dict of keyword arguments.

    Returns:
        The ``torch_pruning.DependencyGraph``.

    Raises:
        ImportError: If torch-pruning is not installed.
        ValueError: If it cannot follow the model.
    """
    if any(is_quantized(parameter) for parameter in model.parameters()):
        raise ValueError("`model` is quantised, and channels must be found before; compress first and quantise last")
    try:
        import torch_pruning  # type: ignore[import-untyped]  # it ships no types
    except ImportError as error:
        raise ImportError(
            "finding the channels that depend on each other needs torch-pruning: "
            "`pip install 'lightning-plugins[pruning]'`"
        ) from error

    def forward(network: nn.Module, given: Any) -> list[Tensor]:
        if isinstance(given, Mapping):
            output = network(**given)
        else:
            output = network(*given) if isinstance(given, tuple) else network(given)
        # Multiplied, so that an output is a node of its own and not the layer that computed it.
        return [leaf * 1.0 for leaf in tensors_in(output) if leaf.grad_fn is not None]

    with torch.enable_grad():
        if not forward(model, inputs):  # errors of the model itself are raised here
            raise ValueError(
                f"`model`: this {type(model).__name__} returns no tensor that depends on its weights in evaluation "
                "mode (as a detector that finds nothing on the example, or a network that only computes a loss in "
                "training), so its channels cannot be followed; pass an example for which it returns some, compress "
                "its backbone alone, or choose ranks alone (`RankScheduling`, `LowRankCompression`)"
            )
        try:
            return torch_pruning.DependencyGraph().build_dependency(model, inputs, forward_fn=forward, verbose=False)
        except Exception as error:
            raise ValueError(
                f"`model`: torch-pruning cannot follow the channels of this {type(model).__name__} "
                f"({type(error).__name__}: {error}); choose ranks alone, which needs no channels (`RankScheduling`, "
                "`LowRankCompression`)"
            ) from error


def tensors_in(output: Any) -> list[Tensor]:
    """All floating tensors in a model's output.

    Args:
        output: A tensor, or tuples, lists and mappings of them.

    Returns:
        The tensors, in order.

    Example:
        >>> tensors_in({"logits": (torch.zeros(2), None)})
        [tensor([0., 0.])]
    """
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    return [leaf for part in output for leaf in tensors_in(part)] if isinstance(output, list | tuple) else []
