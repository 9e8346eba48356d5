"""Arguments that are a name, a callable, or a callable in the words of a configuration file."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_plugins._checks import check_choice
from lightning_plugins.functional.pooling import POOLS

Pool = str | Callable[..., Tensor] | Mapping[str, Any]


def resolve_pool(pool: Pool) -> str | Callable[..., Tensor]:
    """Return the name of a known pool, or the callable that ``pool`` is or names.

    Raises:
        ValueError: If ``pool`` is no known name and nothing callable can be imported from it.
        TypeError: If ``pool`` is neither a string nor callable.
    """
    if isinstance(pool, str) and "." not in pool:
        return check_choice("pool", pool, POOLS)
    return resolve_callable("pool", pool, f"one of {', '.join(map(repr, POOLS))}")


def resolve_callable(name: str, value: object, otherwise: str) -> Callable[..., Any]:
    """Return a callable, given itself, by its import path, or by ``class_path`` and ``init_args``.

    Args:
        name: The argument's name, for the message.
        value: A callable, a dotted path, or a mapping with a ``class_path`` and, possibly, ``init_args``.
        otherwise: What else the argument may be, for the message.

    Returns:
        The callable.

    Raises:
        ValueError: If nothing callable can be imported or made.
        TypeError: If ``value`` is nothing of that.
    """
    if callable(value) and not isinstance(value, str | Mapping):
        return value
    if isinstance(value, Mapping):
        return _made(name, value)
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be {otherwise}, a callable or its import path, got {type(value).__name__}")
    found = _imported(name, value, f"give the dotted path of a function, or {otherwise}")
    if not callable(found):
        raise ValueError(f"`{name}={value!r}` names {type(found).__name__}, which cannot be called")
    if isinstance(found, type):
        raise ValueError(
            f"`{name}={value!r}` names a class; give an object of it, or `class_path: {value}` and `init_args`"
        )
    return found  # type: ignore[no-any-return]  # checked to be callable


def callable_name(value: object) -> str:
    """A name for state keys: the representation of a callable holds an address, another one in every process."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return repr(_plain(value))
    if isinstance(value, nn.Module):  # its settings tell it from another of its class
        return f"{type(value).__module__}.{value!r}" if " at 0x" not in repr(value) else type(value).__qualname__
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__name__)}"


def _plain(value: object) -> object:
    return {str(key): _plain(value[key]) for key in sorted(value, key=str)} if isinstance(value, Mapping) else value


def _made(name: str, value: Mapping[str, Any]) -> Callable[..., Any]:
    path, arguments = value.get("class_path"), value.get("init_args", {})
    unknown = sorted(set(map(str, value)) - {"class_path", "init_args"})
    if not isinstance(path, str) or unknown or not isinstance(arguments, Mapping):
        raise ValueError(
            f"`{name}` as a mapping must have a `class_path` and may have `init_args`, got {dict(value)!r}"
        )
    kind = _imported(name, path, "give the dotted path of a class")
    if not callable(kind):
        raise ValueError(f"`{name}`: `class_path: {path}` names {type(kind).__name__}, which cannot be called")
    try:
        made = kind(**arguments)
    except TypeError as error:
        raise ValueError(f"`{name}`: `init_args` must fit {path}, got {dict(arguments)!r}: {error}") from error
    if not callable(made):
        raise ValueError(f"`{name}`: {path} must make something that can be called, got {type(made).__name__}")
    return made  # type: ignore[no-any-return]  # checked to be callable


def _imported(name: str, path: str, hint: str) -> Any:
    module, _, attribute = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # the last two: nothing before a dot
        raise ValueError(f"`{name}={path!r}` cannot be imported: {error}; {hint}") from error
