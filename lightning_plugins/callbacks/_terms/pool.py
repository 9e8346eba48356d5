"""The ``pool`` argument of callbacks and mixins: a name, a callable, or a callable's import path."""

import importlib
from collections.abc import Callable
from typing import cast

from torch import Tensor

from lightning_plugins._checks import check_choice
from lightning_plugins.functional.pooling import POOLS


def resolve_pool(pool: str | Callable[[Tensor], Tensor]) -> str | Callable[[Tensor], Tensor]:
    """Return the name of a known pool, or the callable that ``pool`` is or names.

    Raises:
        ValueError: If ``pool`` is no known name and nothing callable can be imported from it.
        TypeError: If ``pool`` is neither a string nor callable.
    """
    if callable(pool):
        return pool
    if not isinstance(pool, str):
        raise TypeError(
            f"`pool` must be one of {', '.join(map(repr, POOLS))}, a callable or its import path, "
            f"got {type(pool).__name__}"
        )
    if "." not in pool:
        return check_choice("pool", pool, POOLS)
    module, _, name = pool.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # the last two: nothing before a dot
        raise ValueError(
            f"`pool={pool!r}` cannot be imported: {error}; give the dotted path of a function, "
            f"or one of {', '.join(map(repr, POOLS))}"
        ) from error
    if not callable(found):
        raise ValueError(f"`pool={pool!r}` names {type(found).__name__}, which cannot be called")
    return cast(Callable[[Tensor], Tensor], found)


def pool_name(pool: str | Callable[[Tensor], Tensor]) -> str:
    """A name for state keys: the representation of a callable holds an address, another one in every process."""
    if isinstance(pool, str):
        return pool
    return f"{getattr(pool, '__module__', '')}.{getattr(pool, '__qualname__', type(pool).__name__)}"
