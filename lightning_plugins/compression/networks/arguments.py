"""Checks of arguments that several functions here take."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_finite_number, check_instance, shown


def check_module(model: nn.Module) -> None:
    """Raise an error unless ``model`` is a module.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")


def check_tensors(name: str, values: Sequence[Tensor]) -> None:
    """Raise an error unless ``values`` is a list or tuple of tensors.

    Args:
        name: The argument's name, for the message.
        values: The argument's value.

    Raises:
        TypeError: If it is not.

    Example:
        >>> check_tensors("kept", [1])
        Traceback (most recent call last):
            ...
        TypeError: `kept` must be a list of tensors, got 1 (int) in it
    """
    check_instance(name, values, (list, tuple), "a list of tensors")
    for value in values:
        if not isinstance(value, Tensor):
            raise TypeError(f"`{name}` must be a list of tensors, got {shown(value)} in it")


def check_example(name: str, inputs: Any) -> None:
    """Raise an error unless ``inputs`` are what a model can be called with.

    Args:
        name: The argument's name, for the message.
        inputs: The argument's value.

    Raises:
        TypeError: If they are no tensor, tuple, or dict with strings as keys.

    Example:
        >>> check_example("inputs", [3])
        Traceback (most recent call last):
            ...
        TypeError: `inputs` must be a tensor, a tuple of arguments or a dict of keyword arguments, got list; did you \
mean a tuple?
    """
    rule = f"`{name}` must be a tensor, a tuple of arguments or a dict of keyword arguments"
    if not isinstance(inputs, Tensor | tuple | Mapping):
        hint = "; did you mean a tuple?" if isinstance(inputs, list) else ""
        raise TypeError(f"{rule}, got {type(inputs).__name__}{hint}")
    if isinstance(inputs, Mapping):
        for key in inputs:
            if not isinstance(key, str):
                raise TypeError(f"{rule}, whose names are strings, got {shown(key)}")


def check_moments(calibration: Any) -> None:
    """Raise an error unless ``calibration`` is None or gives moments of layers' inputs.

    Raises:
        TypeError: If it has no method ``moment``.
    """
    if calibration is not None and not callable(getattr(calibration, "moment", None)):
        raise TypeError(
            "`calibration` must be a lightning_plugins.compression.Calibration or have its method `moment(name)`, got "
            f"{shown(calibration)}"
        )


def check_single(name: str, value: float) -> float:
    """Return ``value`` if it is a number that single precision can hold.

    Args:
        name: The argument's name, for the message.
        value: The argument's value.

    Returns:
        ``value``.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is beyond the range of float32.

    Example:
        >>> check_single("init", 1e39)
        Traceback (most recent call last):
            ...
        ValueError: `init` must be within the range of float32, got 1e+39
    """
    if abs(check_finite_number(name, value)) > torch.finfo(torch.float32).max:
        raise ValueError(f"`{name}` must be within the range of float32, got {value!r}")
    return value
