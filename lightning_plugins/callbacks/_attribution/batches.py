"""Read inputs, classes and ground truth from a batch, by key or by a callable."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from torch import Tensor

from lightning_plugins._lightning import MisconfigurationException

Key = int | str | Callable[[Any], Tensor]


def resolve_key(name: str, key: object) -> Key:
    """Return a key of batches, or the callable that it is or names.

    Args:
        name: The argument's name, for the message.
        key: An int for a place in a tuple, a string for a name in a mapping, a callable from the batch to a tensor, or
            its import path, which has a dot in it.

    Returns:
        The key, or the callable.

    Raises:
        TypeError: If it is none of these.
        ValueError: If nothing callable can be imported from a path.
    """
    if callable(key):
        return key
    if isinstance(key, Integral) and not isinstance(key, bool):
        return int(key)
    if isinstance(key, bool) or not isinstance(key, int | str):
        raise TypeError(
            f"`{name}` must be a key of the batch, an int or a string, or a callable from the batch to a tensor, got"
            f" {type(key).__name__}"
        )
    if isinstance(key, str) and "." in key:
        module, _, attribute = key.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"`{name}={key!r}` cannot be imported: {error}; give the dotted path of a function"
            ) from error
        if not callable(found):
            raise ValueError(f"`{name}={key!r}` names {type(found).__name__}, which cannot be called")
        return found  # type: ignore[no-any-return]  # a callable, of whatever it returns
    return key


@dataclass(frozen=True, kw_only=True)
class BatchKeys:
    """Places in a batch: a place in a tuple, a key of a mapping, or a callable from the batch (or its import path).

    In YAML a mapping, without a class path: ``batch: {inputs: image, target: label, mask: box}``.

    Attributes:
        inputs: The model's inputs ``(B, C, *spatial)``.
        target: The true classes, integers of shape ``(B,)``.
        mask: The positions that matter, ``(B, *spatial)``; None if no metric needs them.

    Raises:
        TypeError: If a field is none of these.
        ValueError: If nothing callable can be imported from a path.

    Example:
        >>> BatchKeys(mask=2).resolved()
        {'inputs': 0, 'target': 1, 'mask': 2}
    """

    inputs: Key = 0
    target: Key = 1
    mask: Key | None = None

    def __post_init__(self) -> None:
        for name, key in self.resolved().items():
            if isinstance(key, int):
                object.__setattr__(self, name, key)

    def resolved(self) -> dict[str, Key]:
        """Return the keys that are given, with what import paths name."""
        given = {"inputs": self.inputs, "target": self.target, "mask": self.mask}
        return {name: resolve_key(name, key) for name, key in given.items() if key is not None or name != "mask"}


def take(name: str, key: Key, batch: Any) -> Tensor:
    """Take a tensor out of a batch.

    Args:
        name: The argument's name, for the message.
        key: As `resolve_key` returns it.
        batch: The batch.

    Returns:
        The tensor.

    Raises:
        MisconfigurationException: If the batch does not have it, or it is not a tensor.
    """
    if callable(key):
        found = key(batch)
    else:
        try:
            found = batch[key]
        except (KeyError, IndexError, TypeError) as error:
            has = f"the keys {list(batch)}" if isinstance(batch, Mapping) else f"{_length(batch)} parts"
            raise MisconfigurationException(
                f"`{name}={key!r}` is not in the batch, a {type(batch).__name__} of {has}; give the key of a tensor in"
                " it, or a callable from the batch to a tensor"
            ) from error
    if not isinstance(found, Tensor):
        raise MisconfigurationException(f"`{name}` must give a tensor of the batch, got {type(found).__name__}")
    return found


def key_name(key: object) -> str:
    """A name for state keys: the representation of a callable holds an address, another one in every process."""
    if callable(key):
        return f"{getattr(key, '__module__', '')}.{getattr(key, '__qualname__', type(key).__name__)}"
    return repr(key)


def _length(batch: Any) -> str:
    return str(len(batch)) if hasattr(batch, "__len__") else "no"
