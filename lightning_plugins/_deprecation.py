"""Deprecated argument names, which work for one more version with a warning."""

import inspect
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import wraps
from numbers import Real
from typing import Any, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
_DECORATORS = (__name__, "lightning_plugins._grouping")


class Replaced(NamedTuple):
    """A new name whose values differ from those of the older one.

    Attributes:
        name: The new name.
        convert: Converts an older value to the new one.
    """

    name: str
    convert: Callable[[Any], Any]


def share_left(removed: Any) -> Any:
    """Convert the fraction removed to the fraction left.

    The complement is computed in decimal: 0.1 for 0.9, where ``1 - 0.9`` is slightly less and would exclude a network
    with exactly a tenth left.

    Args:
        removed: The fraction.

    Returns:
        The fraction; anything but a finite number unchanged, to be rejected by the argument check.

    Example:
        >>> share_left(0.9), share_left(0.3), share_left("half")
        (0.1, 0.7, 'half')
    """
    if isinstance(removed, bool) or not isinstance(removed, Real) or not math.isfinite(removed):
        return removed
    return float(1 - Decimal(repr(float(removed))))


def renamed(
    *, listed: bool = False, positional: Sequence[str] = (), **names: str | Replaced
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a callable accept arguments under older names, with a `FutureWarning` that gives the new one.

    Args:
        listed: Whether the signature also shows the older names, with default None, so that command lines and
            configuration files accept them. The callable must then document them.
        positional: Names, older ones included, of arguments that used to be accepted by position after the current
            ones.
        **names: New names by older ones.

    Returns:
        A decorator. The callable's signature shows only the new names, unless ``listed``.

    Example:
        >>> @renamed(minimum="min_channels")
        ... def least(*, min_channels=1):
        ...     return min_channels
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     least(minimum=2)
        2
        >>> print(caught[0].message)
        `minimum` was renamed: pass `min_channels`. The older name works up to the next minor version
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        by_position = [one for one in signature.parameters.values() if one.kind is one.POSITIONAL_OR_KEYWORD]

        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            given: dict[str, Any] = kwargs
            late = args[len(by_position) :] if positional else ()
            _take_by_position(function.__qualname__, positional, late, given)
            for old in [name for name in names if name in given]:
                value = given.pop(old)
                if value is not None or not listed:
                    # A command line passes all arguments, including defaults.
                    _take_older(old, names[old], value, given, signature if listed else None)
            first: Any = args[: len(args) - len(late)]
            return function(*first, **kwargs)

        if listed:
            _list(wrapper, signature, list(names))
        return wrapper

    return decorate


def warn_of_older(text: str) -> None:
    """Warn of an older form, at the line that uses it: the first one outside of the decorators, which may be nested."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__") in _DECORATORS:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, FutureWarning, stacklevel=level + 1)


def _take_by_position(function: str, names: Sequence[str], values: Sequence[Any], given: dict[str, Any]) -> None:
    """Assign positional values to their names."""
    if len(values) > len(names):
        raise TypeError(f"{function}() takes {len(values) - len(names)} positional arguments more than there are")
    for name, value in zip(names, values, strict=False):
        if name in given:
            raise TypeError(f"{function}() got multiple values for argument {name!r}")
        text = f"`{name}` is given by position: pass it by name. The position works up to the next minor version"
        warn_of_older(text)
        given[name] = value


def _take_older(
    old: str, new: str | Replaced, value: Any, given: dict[str, Any], defaults: inspect.Signature | None
) -> None:
    """Move the value of an older name to the new one, which may already hold its default."""
    name, present = (new.name, new.convert(value)) if isinstance(new, Replaced) else (new, value)
    if name in given and (defaults is None or given[name] != defaults.parameters[name].default):
        raise TypeError(f"`{old}` is the older name of `{name}`; pass `{name}` alone, got both")
    shown = f"{name}={present!r}" if isinstance(new, Replaced) else name
    text = f"`{old}` was renamed: pass `{shown}`. The older name works up to the next minor version"
    warn_of_older(text)
    given[name] = present


def _list(wrapper: Callable[..., Any], signature: inspect.Signature, names: Sequence[str]) -> None:
    """Show older names in the signature of a wrapper."""
    kind, annotation = inspect.Parameter.KEYWORD_ONLY, float | None
    older = [inspect.Parameter(name, kind, default=None, annotation=annotation) for name in names]
    parameters = [*signature.parameters.values(), *older]
    vars(wrapper)["__signature__"] = signature.replace(parameters=parameters)
    wrapper.__annotations__ = {**wrapper.__annotations__, **dict.fromkeys(names, annotation)}
