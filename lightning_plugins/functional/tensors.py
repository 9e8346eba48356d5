"""Checks of tensors, with errors that name the argument and the value received."""

import torch
from torch import Tensor

_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, tensor: Tensor, what: str = "a tensor") -> None:
    """Raise an error unless it is a dense tensor with accessible values.

    Raises:
        TypeError: If it is not a tensor, or a sparse or nested one.
        ValueError: If it is on the device ``meta``.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"`{name}` must be {what}, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise TypeError(f"`{name}` must be {what} that is dense, got a nested one; pad it with `to_padded_tensor`")
    if tensor.layout != torch.strided:
        raise TypeError(f"`{name}` must be {what} that is dense, got {tensor.layout}; convert it with `.to_dense()`")
    if tensor.device.type == "meta":
        raise ValueError(f"`{name}` must be {what} with values, got one on the device 'meta'")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise an error unless it is a dense, real floating tensor of at least 16 bits.

    Raises:
        TypeError: If it is of another kind.
    """
    check_tensor(name, tensor, "a floating tensor")
    if tensor.dtype not in _REAL:
        raise TypeError(f"`{name}` must be a floating tensor, got {tensor.dtype}; convert it with `{name}.float()`")


def check_integers(name: str, tensor: Tensor, what: str = "an integer tensor") -> None:
    """Raise an error unless it is a dense tensor of integers.

    Raises:
        TypeError: If it is of another kind.
    """
    check_tensor(name, tensor, what)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"`{name}` must be {what}, got {tensor.dtype}; convert it with `.long()`")


def check_bools(name: str, tensor: Tensor) -> None:
    """Raise an error unless it is a dense bool tensor.

    Raises:
        TypeError: If it is of another kind.
    """
    check_tensor(name, tensor, "a bool tensor")
    if tensor.dtype != torch.bool:
        raise TypeError(f"`{name}` must be a bool tensor, got {tensor.dtype}; convert it with `.bool()`")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise an error for a tensor of another shape.

    Raises:
        ValueError: If the shape differs.
    """
    if tensor.shape != shape:
        raise ValueError(f"`{name}` must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def check_dims(name: str, tensor: Tensor, least: int, shape: str) -> None:
    """Raise an error for a tensor with too few dimensions; ``shape`` is shown in the message.

    Raises:
        ValueError: If there are too few.
    """
    if tensor.ndim < least:
        raise ValueError(f"`{name}` must have shape {shape}, got {tuple(tensor.shape)}")


def check_together(first: str, a: tuple[int, ...], second: str, b: tuple[int, ...]) -> None:
    """Raise an error for shapes, of two tensors or their leading dimensions, that do not broadcast.

    Raises:
        ValueError: If they do not.
    """
    if any(m != n and m != 1 and n != 1 for m, n in zip(reversed(a), reversed(b), strict=False)):
        raise ValueError(f"`{first}` and `{second}` must broadcast, got shapes {tuple(a)} and {tuple(b)}")


def check_leading(name: str, shape: tuple[int, ...], other: str, leading: tuple[int, ...]) -> None:
    """Raise an error for a shape that does not broadcast to the leading dimensions of another tensor.

    Raises:
        ValueError: If it does not.
    """
    if len(shape) > len(leading) or any(
        m not in (1, n) for m, n in zip(reversed(shape), reversed(leading), strict=False)
    ):
        raise ValueError(
            f"`{name}` must be one number, or fit the leading dimensions {tuple(leading)} of `{other}`, got shape "
            f"{tuple(shape)}"
        )


def check_real(name: str, tensor: Tensor, what: str = "a tensor of real numbers") -> None:
    """Raise an error unless it is a dense tensor of real numbers: floats, integers or bools.

    Raises:
        TypeError: If it is of another kind.
    """
    check_tensor(name, tensor, what)
    if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype not in _REAL):
        raise TypeError(f"`{name}` must be {what}, got {tensor.dtype}")
