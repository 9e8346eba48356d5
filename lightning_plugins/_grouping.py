"""Arguments that have become fields of a dataclass, and work as arguments for one more version with a warning."""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from lightning_plugins._deprecation import warn_of_older

P = ParamSpec("P")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Group:
    """A dataclass whose fields used to be arguments of a callable.

    Attributes:
        kind: The dataclass. All of its fields have defaults.
        older: Fields by the older names of their arguments, where these differ. A field whose name is also that of an
            argument of the callable must be listed here, or it has no older name.
        main: The field that a plain value of the argument stands for (``search="beam"``), or None where only the
            dataclass is accepted. It has no older name but those in ``older``.
        new: Fields that never were arguments of the callable.
        nested: The groups of fields that are dataclasses themselves. ``older`` has dotted paths to their fields.
    """

    kind: type
    older: Mapping[str, str] = dataclasses.field(default_factory=dict)
    main: str | None = None
    new: Collection[str] = ()
    nested: Mapping[str, "Group"] = dataclasses.field(default_factory=dict)

    def names(self, present: Mapping[str, Any]) -> dict[str, str]:
        """Return the fields by the older names of their arguments."""
        without = {*self.older.values(), *self.new, self.main}
        fields = [field.name for field in dataclasses.fields(self.kind) if field.name not in without]
        return {**{name: name for name in fields if name not in present}, **self.older}

    def filled(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of fields, given by dotted paths, with those of nested dataclasses gathered."""
        own = {path: value for path, value in values.items() if "." not in path}
        for name, group in self.nested.items():
            inside = {path.removeprefix(f"{name}."): values[path] for path in values if path.startswith(f"{name}.")}
            if inside and name in own and group.main is not None:
                inside = {group.main: own[name], **inside}
            if inside:
                own[name] = group.kind(**group.filled(inside))
        return own


def grouped(**groups: type | Group) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a callable accept the fields of its dataclass arguments as arguments of their own, with a `FutureWarning`.

    Args:
        **groups: The dataclass of each argument that takes one, or a `Group`.

    Returns:
        A decorator. The signature stays that of the callable.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Phase:
        ...     begin: float = 0.1
        ...     end: float = 0.7
        >>> @grouped(phase=Phase)
        ... def schedule(budget, *, phase=Phase()):
        ...     return phase
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     schedule(0.5, end=0.6)
        Phase(begin=0.1, end=0.6)
        >>> print(caught[0].message)
        `end` is a field of `phase` now: pass `phase=Phase(end=0.6)`. The argument works up to the next minor version
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        present = inspect.signature(function).parameters
        known = {name: group if isinstance(group, Group) else Group(group) for name, group in groups.items()}
        fields = {old: (name, field) for name, group in known.items() for old, field in group.names(present).items()}
        ordered = [name for name, one in present.items() if one.kind is one.POSITIONAL_OR_KEYWORD]

        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            given: dict[str, Any] = kwargs
            by_position: Any = list(args)
            collected: dict[str, dict[str, tuple[str, Any]]] = {}
            for old in [name for name in given if name in fields]:
                name, field = fields[old]
                values = collected.setdefault(name, {})
                if field in values:
                    raise TypeError(f"`{old}` and `{values[field][0]}` are older names of one argument, got both")
                values[field] = (old, given.pop(old))
            for name, values in collected.items():
                if name in ordered[: len(args)]:
                    place = ordered.index(name)
                    by_position[place] = _gather(name, known[name], values, {name: by_position[place]})
                else:
                    given[name] = _gather(name, known[name], values, given)
            return function(*by_position, **kwargs)

        return wrapper

    return decorate


def _gather(name: str, group: Group, values: Mapping[str, tuple[str, Any]], given: Mapping[str, Any]) -> Any:
    """Build the dataclass of an argument from the arguments that its fields used to be."""
    fields = {field: value for field, (_, value) in values.items()}
    if name in given:
        first = next(old for old, _ in values.values())
        if group.main is None or isinstance(given[name], group.kind) or group.main in fields:
            kind = group.kind.__name__
            raise TypeError(f"`{first}` is a field of `{name}` now; pass `{name}={kind}(...)` alone, got both")
        fields = {group.main: given[name], **fields}
    fields = group.filled(fields)
    shown = ", ".join(f"{field}={value!r}" for field, value in fields.items())
    olds = " and ".join(f"`{old}`" for old, _ in values.values())
    verb, noun, works = ("is a field", "argument", "works") if len(values) == 1 else ("are fields", "arguments", "work")
    text = (
        f"{olds} {verb} of `{name}` now: pass `{name}={group.kind.__name__}({shown})`. The {noun} {works} up to the "
        "next minor version"
    )
    warn_of_older(text)
    return group.kind(**fields)
