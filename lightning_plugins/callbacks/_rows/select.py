"""Select one tensor from a layer's inputs or outputs."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_plugins._checks import nearest

Step = str | int
Select = Step | Sequence[Step] | None


def check_select(select: Select, name: str = "select") -> tuple[Step, ...] | None:
    """Return ``select`` as a path: indices, keys and names of attributes.

    Raises:
        TypeError: If a step is neither an int nor a string.
        ValueError: If it is empty.
    """
    if select is None:
        return None
    path = (select,) if isinstance(select, str | int) else select
    rule = f"`{name}` must be an index, a key or the name of an attribute, or a list of them from the outside in"
    if (
        isinstance(path, bytes)
        or not isinstance(path, Sequence)
        or any(isinstance(s, bool) or not isinstance(s, str | int) for s in path)
    ):
        raise TypeError(f"{rule}, got {select!r} ({type(select).__name__})")
    if not path or "" in path:
        raise ValueError(f"{rule}, got {select!r}")
    return tuple(path)


def selected(value: Any, path: tuple[Step, ...] | None, label: str) -> Tensor | PackedSequence:
    """The tensor that a path leads to, or without a path the first one.

    Args:
        value: What a layer received or returned.
        path: As `check_select` returns it.
        label: The layer, for the message.

    Returns:
        A tensor, packed sequences included.

    Raises:
        ValueError: If the path leads nowhere.
        TypeError: If it does not end at a tensor, or there is none at the first place.
    """
    if path is None:
        return first_tensor(value, label)
    for depth, step in enumerate(path):
        value = _taken(value, step, path[: depth + 1], label)
    if not isinstance(value, Tensor | PackedSequence):
        raise TypeError(
            f"`select={list(path)}` must end at a tensor of {label!r}, got {_described(value)}; add a step that leads "
            "into it"
        )
    return value


def first_tensor(value: Any, label: str) -> Tensor | PackedSequence:
    """Return the selected tensor of a layer's inputs or outputs.

    Args:
        value: A tensor, a tuple or list or dictionary of keyword arguments whose first entry is one, or a transformers
            output, of which ``last_hidden_state`` is taken.
        label: The layer's name, for the message.

    Returns:
        The tensor itself, or packed sequences.

    Raises:
        TypeError: If there is no tensor at that place.
    """
    if isinstance(value, Tensor | PackedSequence):
        return value
    if isinstance(value, Mapping) and value:
        return first_tensor(value.get("last_hidden_state", next(iter(value.values()))), label)
    if isinstance(value, tuple | list) and value:
        return first_tensor(value[0], label)
    raise TypeError(
        f"`layers`: {label!r} gave {type(value).__name__}, not a tensor; name a layer that returns one, "
        "the input of the layer that takes it ('name:input'), or where it is in there (`select`)"
    )


def _taken(value: Any, step: Step, path: Sequence[Step], label: str) -> Any:
    if isinstance(value, Mapping):
        if step in value:
            return value[step]
    elif isinstance(step, int):
        if isinstance(value, Sequence) and -len(value) <= step < len(value):
            return value[step]
    elif not isinstance(value, Tensor) and hasattr(value, step):
        return getattr(value, step)
    if isinstance(value, Mapping) and isinstance(step, int) and -len(value) <= step < len(value):
        return list(value.values())[step]  # a transformers output is a tuple too
    choices = [str(key) for key in value] if isinstance(value, Mapping) else list(getattr(value, "__dict__", {}))
    choices += list(getattr(value, "_fields", ()))
    near = nearest(str(step), choices, limit=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"`select={list(path)}` must lead into {label!r}, but there is {_described(value)}{hint}")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with {', '.join(map(repr, value)) or 'nothing in it'}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
