"""The structure of a network in words and numbers that a person can read, and what differs between two."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lightning_plugins.compression.channels.resize import head_attributes
from lightning_plugins.compression.low_rank.splittable import is_low_rank_pair
from lightning_plugins.compression.structure.state_keys import Shape


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Describe the layers of a network: kind, sizes, ranks, heads, by name.

    Args:
        model: The network.

    Returns:
        For every module that has tensors of its own, or attention heads, primitives that a JSON file can hold. A
        low-rank layer is one entry.

    Example:
        >>> describe(nn.Sequential(nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 6))))
        {'0': {'kind': 'low-rank Linear', 'rank': 2, 'sizes': {'0.weight': [2, 8], '1.weight': [6, 2], '1.bias': [6]}}}
    """
    found: dict[str, dict[str, Any]] = {}
    for name, module, halves in _entries(model):
        sizes = _sizes(module, deep=bool(halves))
        entry: dict[str, Any] = {"kind": type(module).__name__}
        if halves:
            entry = {"kind": f"low-rank {type(halves[0]).__name__}", "rank": _rank(halves[0])}
        if heads := head_attributes(module):
            entry["heads"] = heads
        if sizes or heads:
            found[name] = {**entry, "sizes": sizes}
    return found


def differences(stored: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Say where two descriptions differ.

    Args:
        stored: One, as a file has it.
        found: The other, of a network.

    Returns:
        A phrase for each layer that differs.

    Example:
        >>> differences({"fc": {"kind": "Linear", "sizes": {"weight": [2, 3]}}}, {})
        ["'fc' (Linear) is not there"]
    """
    reasons = []
    for name in dict.fromkeys([*stored, *found]):
        one, other = stored.get(name), found.get(name)
        if one is None or other is None:
            kind = (one or other or {}).get("kind", "?")
            reasons.append(f"{name!r} ({kind}) is {'not there' if other is None else 'not in the file'}")
        elif one != other:
            keys = [key for key in dict.fromkeys([*one, *other]) if one.get(key) != other.get(key)]
            reasons.append(f"{name!r} has {keys[0]} {other.get(keys[0])}, the file {one.get(keys[0])}")
    return reasons


def _entries(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[nn.Module, ...]]]:
    """Modules by name, with the halves of those that are a low-rank layer, and without these halves."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        halves = tuple(module) if type(module) is nn.Sequential and len(module) == 2 else ()
        if halves and not is_low_rank_pair(halves[0], halves[1]):
            halves = ()
        inside.update(halves)
        yield name, module, halves


def _rank(first: nn.Module) -> int:
    return int(first.get_parameter("weight").shape[0])


def _sizes(module: nn.Module, *, deep: bool) -> dict[str, list[int]]:
    tensors: dict[str, Any] = {**module._parameters, **module._buffers}
    if deep:
        tensors = dict(module.named_parameters())
    skipped = module._non_persistent_buffers_set
    shapes: dict[str, Shape] = {
        name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None and name not in skipped
    }
    return {name: list(shape) for name, shape in shapes.items()}
