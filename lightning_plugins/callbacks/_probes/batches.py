"""Entries of a batch: by key, by position, or by a function of the batch."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

Entry = str | int | Callable[[Any], Tensor]


def check_entry(name: str, entry: Entry) -> Entry:
    """Return the key or position that ``entry`` is, or the callable that it is or names.

    Args:
        name: The argument's name, for the message.
        entry: Its value.

    Returns:
        What `read_entry` takes.

    Raises:
        TypeError: If it is none of them.
        ValueError: If an import path leads nowhere.
    """
    if callable(entry) or (isinstance(entry, int) and not isinstance(entry, bool)):
        return entry
    if not isinstance(entry, str):
        raise TypeError(
            f"`{name}` must be a key of the batch, a position in it, a callable or its import path, got "
            f"{type(entry).__name__}"
        )
    if "." not in entry:
        return entry
    module, _, attribute = entry.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # the last two: nothing before a dot
        raise ValueError(
            f"`{name}={entry!r}` cannot be imported: {error}; give a key without dots, or a path"
        ) from error
    if not callable(found):
        raise ValueError(f"`{name}={entry!r}` names {type(found).__name__}, which cannot be called")
    function: Callable[[Any], Tensor] = found
    return function


def entry_name(entry: object) -> str:
    """A name for state keys: the representation of a callable holds an address, another one in every process."""
    if entry is None or isinstance(entry, str | int):
        return repr(entry)
    return f"{getattr(entry, '__module__', '')}.{getattr(entry, '__qualname__', type(entry).__name__)}"


def read_entry(name: str, entry: Entry, batch: Any) -> Tensor:
    """The entry's tensor in a batch.

    Args:
        name: The argument's name, for the message.
        entry: What `check_entry` returned.
        batch: The batch.

    Returns:
        The tensor.

    Raises:
        ValueError: If the batch has no such entry.
        TypeError: If it is not a tensor.
    """
    if isinstance(entry, str | int):
        held: Any
        if isinstance(batch, Mapping):
            held = batch.get(entry)
            choices = f"its keys are {', '.join(map(repr, batch))}"
        elif isinstance(entry, str):
            held = getattr(batch, entry, None)
            choices = "it is not a mapping: give a position in it, such as 1, or a callable"
        else:
            inside = isinstance(batch, Sequence) and -len(batch) <= entry < len(batch)
            held = batch[entry] if inside else None
            choices = f"it has {len(batch)} entries" if isinstance(batch, Sequence) else "it is not a sequence"
        if held is None:
            raise ValueError(f"`{name}`: the batch, a {type(batch).__name__}, has no {entry!r}; {choices}")
    else:
        held = entry(batch)
    if not isinstance(held, Tensor):
        raise TypeError(f"`{name}` must give a tensor, got {type(held).__name__}")
    return held


def first_input(batch: Any) -> Tensor:
    """The first tensor of a batch: the network's input, by custom.

    Args:
        batch: A tensor, or a mapping or sequence whose first entry leads to one.

    Returns:
        The tensor itself.

    Raises:
        TypeError: If there is none at that place.
    """
    if isinstance(batch, Tensor):
        return batch
    entries = list(batch.values()) if isinstance(batch, Mapping) else batch
    if isinstance(entries, Sequence) and entries and not isinstance(entries, str):
        return first_input(entries[0])
    raise TypeError(
        f"`groups`: no tensor leads the batch, a {type(batch).__name__}, to tell samples apart by; pass `groups`"
    )
