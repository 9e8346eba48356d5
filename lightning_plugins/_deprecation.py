"""Older names of arguments, which work for one version with a warning."""

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import wraps
from numbers import Real
from typing import Any, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Replaced(NamedTuple):
    """A present name whose values differ from those of the older one.

    Attributes:
        name: The present name.
        convert: Gives the present value for an older one.
    """

    name: str
    convert: Callable[[Any], Any]


def share_left(removed: Any) -> Any:
    """Convert the fraction that is removed to the share that is left.

    The complement is that of the decimal digits: 0.1 for 0.9, where ``1 - 0.9`` is less and would exclude a network
    that has exactly a tenth left.

    Args:
        removed: The fraction.

    Returns:
        The share; anything but a finite number as it is, for the check of the argument to refuse.

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
    """Let a callable take arguments under older names, with a `FutureWarning` that gives the present one.

    Args:
        listed: Whether the signature shows the older names too, None by default, so that a command line and a
            configuration file take them. The documentation of the callable has to explain them then.
        positional: Names, older ones included, of arguments that were once taken by position behind those that are.
        **names: The present names by the older ones.

    Returns:
        A decorator. The callable's signature shows the present names alone, unless they are listed.

    Example:
        >>> @renamed(minimum="min_channels")
        ... def least(*, min_channels=1):
        ...     return min_channels
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     least(minimum=2)
        2
        >>> print(caught[0].message)
        `minimum` has another name: pass `min_channels`. The older name works up to the next minor version
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
                    # A command line passes all arguments, those at their default too.
                    _take_older(old, names[old], value, given, signature if listed else None)
            first: Any = args[: len(args) - len(late)]
            return function(*first, **kwargs)

        if listed:
            _list(wrapper, signature, list(names))
        return wrapper

    return decorate


def _take_by_position(function: str, names: Sequence[str], values: Sequence[Any], given: dict[str, Any]) -> None:
    """Put values that came by position under their names."""
    if len(values) > len(names):
        raise TypeError(f"{function}() takes {len(values) - len(names)} positional arguments more than there are")
    for name, value in zip(names, values, strict=False):
        if name in given:
            raise TypeError(f"{function}() got multiple values for argument {name!r}")
        text = f"`{name}` is given by position: pass it by name. The position works up to the next minor version"
        warnings.warn(text, FutureWarning, stacklevel=3)
        given[name] = value


def _take_older(
    old: str, new: str | Replaced, value: Any, given: dict[str, Any], defaults: inspect.Signature | None
) -> None:
    """Put the value of an older name under the present one, which may stand there with its default already."""
    name, present = (new.name, new.convert(value)) if isinstance(new, Replaced) else (new, value)
    if name in given and (defaults is None or given[name] != defaults.parameters[name].default):
        raise TypeError(f"`{old}` is the older name of `{name}`; pass `{name}` alone, got both")
    shown = f"{name}={present!r}" if isinstance(new, Replaced) else name
    text = f"`{old}` has another name: pass `{shown}`. The older name works up to the next minor version"
    warnings.warn(text, FutureWarning, stacklevel=3)
    given[name] = present


def _list(wrapper: Callable[..., Any], signature: inspect.Signature, names: Sequence[str]) -> None:
    """Show older names in the signature of a wrapper."""
    kind, annotation = inspect.Parameter.KEYWORD_ONLY, float | None
    older = [inspect.Parameter(name, kind, default=None, annotation=annotation) for name in names]
    parameters = [*signature.parameters.values(), *older]
    vars(wrapper)["__signature__"] = signature.replace(parameters=parameters)
    wrapper.__annotations__ = {**wrapper.__annotations__, **dict.fromkeys(names, annotation)}
