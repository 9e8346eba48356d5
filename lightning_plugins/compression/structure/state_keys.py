"""A state dict's keys compared with those of a model: prefixes, wrappers, and shapes by clean name."""

from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any, TypeVar

from torch import nn

from lightning_plugins.compression.networks.arguments import check_module
from lightning_plugins.selection import WRAPPERS

Shape = tuple[int, ...]
T = TypeVar("T")


def values_in(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict, taken out of a checkpoint that has one under ``"state_dict"``.

    Args:
        state_dict: A state dict or a checkpoint.

    Returns:
        The state dict.

    Raises:
        TypeError: If it is not a mapping.

    Example:
        >>> values_in({"state_dict": {"fc.bias": 0}, "epoch": 3})
        {'fc.bias': 0}
    """
    if not isinstance(state_dict, Mapping):
        hint = "; load the file first, with `torch.load`" if isinstance(state_dict, str) else ""
        raise TypeError(f"`state_dict` must be a mapping from names to tensors, got {type(state_dict).__name__}{hint}")
    inner = state_dict.get("state_dict")
    return inner if isinstance(inner, Mapping) else state_dict


def shapes_in(state_dict: Mapping[str, Any]) -> dict[str, Shape]:
    """The shapes of a state dict's tensors by clean name.

    Args:
        state_dict: A state dict, or a checkpoint that has one under ``"state_dict"``.

    Returns:
        Shapes by name, without the segments that wrappers put into names.

    Raises:
        TypeError: If it is not a mapping.
        ValueError: If it holds no tensors.

    Example:
        >>> shapes_in({"state_dict": {"_orig_mod.fc.weight": nn.Linear(3, 2).weight}})
        {'fc.weight': (2, 3)}
    """
    found = values_in(state_dict)
    shapes = {clean(key): tuple(value.shape) for key, value in found.items() if hasattr(value, "shape")}
    if not shapes:
        keys = ", ".join(map(repr, list(found)[:4])) or "nothing"
        raise ValueError(f"`state_dict` must hold a module's tensors, or have them under 'state_dict', got {keys}")
    return shapes


def shapes_of(model: nn.Module) -> dict[str, Shape]:
    """The shapes of a model's own tensors, as its state dict would name them, by clean name.

    Args:
        model: The model.

    Returns:
        Shapes by name; a lazy parameter has an empty one.

    Example:
        >>> shapes_of(nn.Sequential(nn.Linear(3, 2)))
        {'0.weight': (2, 3), '0.bias': (2,)}
    """
    shapes: dict[str, Shape] = {}
    for name, module in named_modules(model):
        own: dict[str, Any] = {**module._parameters, **module._buffers}
        for key, tensor in own.items():
            if tensor is not None and key not in module._non_persistent_buffers_set:
                shapes[f"{name}.{key}" if name else key] = tuple(tensor.shape)
    return shapes


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by clean name; shared modules under each name, wrapped modules under their wrapper's.

    Args:
        model: The model.

    Yields:
        Name and module.
    """
    check_module(model)
    for name, module in model.named_modules(remove_duplicate=False):
        yield clean(name), module


def align(incoming: Mapping[str, T], known: Mapping[str, Shape]) -> dict[str, T]:
    """Rename what comes in as the model names it, where all names of one side have a prefix that the other lacks.

    Args:
        incoming: Shapes, or other values, by the names of a state dict.
        known: Shapes by the names of the model.

    Returns:
        The incoming values by the model's names.

    Example:
        >>> align({"module.fc.weight": (2, 3)}, {"fc.weight": (2, 3), "fc.bias": (2,)})
        {'fc.weight': (2, 3)}
    """
    candidates = [dict(incoming)]
    candidates += [{key.removeprefix(prefix): shape for key, shape in incoming.items()} for prefix in _heads(incoming)]
    candidates += [{prefix + key: shape for key, shape in incoming.items()} for prefix in _heads(known)]
    return max(candidates, key=lambda renamed: sum(is_known(key, known) for key in renamed))  # the first of equals


def is_known(key: str, known: Mapping[str, Shape]) -> bool:
    """Return whether the model has a tensor of this name, or a weight of which it could be a factor.

    Args:
        key: The name of a tensor.
        known: Shapes by the names of the model.

    Returns:
        Whether it has.

    Example:
        >>> is_known("fc.1.bias", {"fc.weight": (2, 3)})
        True
    """
    layer, _, _ = half_of(key)
    return key in known or (layer is not None and f"{layer}.weight" in known)


def half_of(key: str) -> tuple[str | None, str, str]:
    """Take the name of a low-rank layer's tensor apart.

    Args:
        key: The name of a tensor.

    Returns:
        The layer, which half, and the tensor; the layer is None if the name is not of this form.

    Example:
        >>> half_of("net.fc.1.bias")
        ('net.fc', '1', 'bias')
    """
    layer, _, rest = key.rpartition(".")
    layer, _, half = layer.rpartition(".")
    return (layer if layer and half in {"0", "1"} and rest in {"weight", "bias"} else None), half, rest


def clean(name: str) -> str:
    """A name without the segments that wrappers put into it.

    Args:
        name: A dotted name.

    Returns:
        The name without them.
    """
    return ".".join(segment for segment in name.split(".") if segment not in WRAPPERS)


def _heads(names: Mapping[str, Any]) -> list[str]:
    """The beginnings that all names share, such as ``"model."`` and ``"model.net."``."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    common = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
    return [".".join(common[: count + 1]) + "." for count in range(len(common))]
