"""Hooks of modules that a copy of the module, or a pickle of it, is free of."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import nn


class Hook:
    """A hook that answers for one module only, and leaves nothing where that module is copied or pickled.

    Args:
        own: The module it is registered on. A shallow copy shares the hooks, which are inactive there.
        act: Called with what torch hands to the hook, less the module.
    """

    def __init__(self, own: nn.Module, act: Callable[..., None]) -> None:
        self._own = own
        self._act = act

    def __call__(self, module: nn.Module, *values: Any) -> None:
        if module is self._own:
            self._act(*values)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Absent":
        return _Absent()

    def __reduce__(self) -> Any:
        return _nothing()


class _Absent:
    """Stand-in for a hook in a copy of its module: it removes itself at the first call."""

    def __call__(self, module: nn.Module, *values: Any) -> None:
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook is self]:
                del hooks[key]
                for flags in _flags(module):
                    flags.pop(key, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Absent":
        return _Absent()

    def __reduce__(self) -> Any:
        return _nothing()


def _flags(module: nn.Module) -> list[dict[int, bool]]:
    """Flags that torch keeps for hooks by their keys."""
    return [
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
        module._forward_pre_hooks_with_kwargs,
    ]


def _nothing() -> tuple[Any, tuple[Any, ...]]:
    """Return a function of the standard library that takes anything and returns None: its pickle needs no package."""
    return getattr, (nullcontext(), "__exit__")
