"""Older names of arguments, which work for one version with a warning."""

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a callable take keyword arguments under older names, with a `FutureWarning` that gives the present one.

    Args:
        **names: The present names by the older ones.

    Returns:
        A decorator. The callable's signature shows the present names alone.

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
        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            given: dict[str, Any] = kwargs
            for old, new in names.items():
                if old not in given:
                    continue
                if new in given:
                    raise TypeError(f"`{old}` is the older name of `{new}`; pass `{new}` alone, got both")
                text = f"`{old}` has another name: pass `{new}`. The older name works up to the next minor version"
                warnings.warn(text, FutureWarning, stacklevel=2)
                given[new] = given.pop(old)
            return function(*args, **kwargs)

        return wrapper

    return decorate
