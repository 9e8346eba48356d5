"""Checks of arguments against annotations, for functions that are not called in training steps.

A function calls `check_arguments` in its first line, so that its signature and documentation are unchanged. Functions
that are called at every step, compiled, or vectorised check their arguments explicitly instead.
"""

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Any, ForwardRef, Literal, TypeVar, Union, get_args, get_origin, is_typeddict

import torch
from torch import Tensor

from lightning_plugins._checks import check_choice, check_int, shown
from lightning_plugins.functional.tensors import check_tensor

_UNKNOWN = (str, ForwardRef)  # stands for a name that is imported only for type checkers

_WORDS: dict[Any, str] = {int: "an int", float: "a number", str: "a string", bool: "True or False", Tensor: "a tensor"}
_CALLS = ("__call__", "__getitem__", "__iter__", "__len__")  # members of a protocol that count besides public names


def check_arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raise an error for arguments that do not match a function's annotations.

    Args:
        function: The function, or the ``__init__`` of a class.
        given: Its arguments by name: ``locals()``, in its first line.

    Raises:
        TypeError: If one is of another type, or a sparse or nested tensor.
        ValueError: If one is a tensor without values.

    Example:
        >>> def draw(steps: Sequence[int], title: str | None = None) -> None:
        ...     check_arguments(draw, locals())
        >>> draw([0, 10], title=3)
        Traceback (most recent call last):
            ...
        TypeError: `title` must be of type str | None, got 3 (int)
    """
    for name, kind in _annotations(function):
        value = given[name]
        if not fits(value, kind):
            place, value, kind = _misfit(name, value, kind)
            if get_origin(kind) is Literal:
                check_choice(place, value, map(str, get_args(kind)))
            raise TypeError(f"`{place}` must be {_spelled(kind)}, got {shown(value)}")
        for tensor in _tensors(value):
            check_tensor(name, tensor)


def check_index(name: str, number: int, length: int) -> None:
    """Raise an error for an invalid index into a data set.

    Raises:
        IndexError: If it is out of range, which also ends a loop over the data set.
    """
    if not 0 <= check_int(name, number) < length:
        raise IndexError(f"`{name}` must be in 0 to {length - 1}, got {number}")


def fits(value: Any, kind: Any) -> bool:
    """Tell whether a value matches an annotation, including the entries of collections.

    Args:
        value: The value.
        kind: The annotation.

    Returns:
        Whether it does. NumPy numbers are numbers, bools are not; vectors are sequences of numbers.

    Example:
        >>> fits([1, 2.5], Sequence[float]), fits("ab", Sequence[str]), fits(True, int)
        (True, False, False)
    """
    if isinstance(kind, TypeVar):
        return kind.__bound__ is None or fits(value, kind.__bound__)
    if isinstance(kind, _UNKNOWN):
        return True
    origin, inner = get_origin(kind), get_args(kind)
    if origin in {Union, UnionType}:
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return any(_is(value, type(one)) and value == one for one in inner)
    if kind is None or kind is type(None):
        return value is None
    if inspect.isclass(origin) and issubclass(origin, Iterable):
        return _holds(value, origin, inner)
    return _is(value, origin or kind)


def _is(value: Any, kind: Any) -> bool:
    """Tell whether a value is of a type without type arguments."""
    if kind is Any:
        return True
    if kind is Callable:
        return callable(value)
    if kind in {float, int}:
        return isinstance(value, Real if kind is float else Integral) and not isinstance(value, bool)
    if getattr(kind, "_is_protocol", False):
        return all(hasattr(value, name) for name in vars(kind) if not name.startswith("_") or name in _CALLS)
    return isinstance(value, Mapping if is_typeddict(kind) else kind)


def _holds(value: Any, kind: type, inner: tuple[Any, ...]) -> bool:
    """Tell whether a value is a collection with such entries."""
    if kind is Sequence and inner[0] in {int, float} and getattr(value, "ndim", None) == 1:
        return isinstance(value, Tensor) or all(fits(one, inner[0]) for one in value.tolist())
    if isinstance(value, str | bytes) or not isinstance(value, (list, tuple) if kind in {list, tuple} else kind):
        return False
    if isinstance(value, Mapping):
        return issubclass(kind, Mapping) and all(
            fits(key, inner[0]) and fits(one, inner[-1]) for key, one in value.items()
        )
    if isinstance(value, Tensor):
        return inner[0] in {Any, Tensor, float, int}
    if not isinstance(value, Collection):
        return True  # an iterator can be read only once
    if kind is tuple and inner[-1] is not ...:
        return len(value) == len(inner) and all(fits(one, entry) for one, entry in zip(value, inner, strict=True))
    return all(fits(one, inner[0]) for one in value)


def _misfit(name: str, value: Any, kind: Any) -> tuple[str, Any, Any]:
    """The part that does not match: an entry if the collection itself matches."""
    origin, inner = get_origin(kind), get_args(kind)
    if isinstance(value, Mapping) and inspect.isclass(origin) and issubclass(origin, Mapping):
        for key, one in value.items():
            if not fits(one, inner[-1]):
                return f"{name}[{key!r}]", one, inner[-1]
    return name, value, kind


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [one for one in value if isinstance(one, torch.Tensor)]


@cache
def _annotations(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    named = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.annotation) for p in parameters if p.annotation is not p.empty and p.kind in named]


def _spelled(kind: Any) -> str:
    return _WORDS.get(kind) or "of type " + re.sub(r"(?:\w+\.)+(?=\w)", "", inspect.formatannotation(kind))
