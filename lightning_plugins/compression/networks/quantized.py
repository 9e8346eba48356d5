"""Weights in integers: torchao's tensors, which look like floating ones."""

from typing import Any

from torch import Tensor, nn


def is_quantized(tensor: Any) -> bool:
    """Return whether a tensor holds integers and a scale instead of floating-point numbers.

    Args:
        tensor: Any object.

    Returns:
        Whether it is one of torchao's tensors, or a parameter with one; torchao is not imported for it.

    Example:
        >>> is_quantized(nn.Linear(2, 3).weight)
        False
    """
    data = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    return isinstance(data, Tensor) and type(data).__module__.partition(".")[0] == "torchao"
