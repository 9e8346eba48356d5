"""Linear layers whose weight is stored transposed: GPT-2's ``Conv1D`` of Hugging Face's transformers."""

import sys
from typing import Any

from torch import Tensor, nn

from lightning_plugins.weights import Scheme, matrix_to_weight


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module is the ``Conv1D`` of transformers: a linear layer whose weight is ``(in, out)``.

    Args:
        module: Any module; transformers is not imported for it.

    Returns:
        Whether it is.

    Example:
        >>> is_transposed(nn.Linear(2, 3))
        False
    """
    source = sys.modules.get("transformers.pytorch_utils")  # a model with such a layer has imported it
    kind = getattr(source, "Conv1D", None)
    return kind is not None and type(module) is kind


def as_linear(layer: Any) -> Any:
    """A layer with its weight the way torch stores it, ``(out, in, *kernel)``.

    Args:
        layer: A linear layer or convolution, or a transposed one.

    Returns:
        For a transposed layer an `nn.Linear` whose parameters are views of the layer's; any other layer itself.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> as_linear(layer) is layer
        True
    """
    if not is_transposed(layer):
        return layer
    inputs, outputs = layer.weight.shape
    linear = nn.Linear(inputs, outputs, device="meta", dtype=layer.weight.dtype).train(layer.training)
    linear.weight = nn.Parameter(layer.weight.detach().T, requires_grad=layer.weight.requires_grad)
    linear.bias = nn.Parameter(layer.bias.detach(), requires_grad=layer.bias.requires_grad)
    return linear


def stored_weight(layer: nn.Module, matrix: Tensor, *, scheme: Scheme = 1) -> Tensor:
    """A matrix in the shape in which a layer stores its weight.

    Args:
        layer: The layer.
        matrix: A matrix such as `weight_to_matrix` makes of its weight.
        scheme: How a kernel becomes a matrix.

    Returns:
        Tensor of the shape of the layer's weight.

    Example:
        >>> import torch
        >>> stored_weight(nn.Conv2d(2, 3, 3), torch.zeros(3, 18)).shape
        torch.Size([3, 2, 3, 3])
    """
    shape: tuple[int, ...] = tuple(layer.get_parameter("weight").shape)
    return matrix.T if is_transposed(layer) else matrix_to_weight(matrix, shape, scheme=scheme)
