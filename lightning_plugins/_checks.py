"""Argument checks: each returns the value, or raises an error that says what is wrong."""

import difflib
import math
from collections.abc import Iterable, Sequence, Set
from numbers import Integral, Real
from typing import TypeVar

_Value = TypeVar("_Value")
_MOST = 2**63  # larger numbers do not fit into a tensor


def check_finite_number(name: str, value: float) -> float:
    """Return ``value`` if it is a finite number.

    Args:
        name: The argument's name, for the message.
        value: The argument's value.

    Returns:
        ``value``; a number of NumPy's as an int or float.

    Raises:
        TypeError: If ``value`` is not a number (or is a bool).
        ValueError: If ``value`` is NaN, infinite, or an int beyond 64 bits.
    """
    if not is_number(value):
        raise TypeError(f"`{name}` must be a number, got {shown(value)}")
    value = plain_number(value)
    if isinstance(value, int) and not -_MOST < value < _MOST:
        raise ValueError(f"`{name}` must be within 64 bits, got {shown(value)}")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value!r}")
    return value


def is_number(value: object) -> bool:
    """Tell an int or a float, of Python or of NumPy, from everything else; a bool is neither."""
    return isinstance(value, int | float | Real) and not isinstance(value, bool)


def plain_number(value: float) -> float:
    """Convert to a Python int or float: NumPy numbers differ in a ``repr`` and in a checkpoint."""
    if type(value) is int or type(value) is float:
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def check_bool(name: str, value: bool) -> bool:
    """Return ``value`` if it is a bool.

    Args:
        name: The argument's name, for the message.
        value: The argument's value.

    Returns:
        ``value``, unchanged.

    Raises:
        TypeError: If ``value`` is not a bool.

    Example:
        >>> check_bool("centred", 1)
        Traceback (most recent call last):
            ...
        TypeError: `centred` must be True or False, got 1 (int)
    """
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {shown(value)}")
    return value


def check_text(name: str, value: str, what: str = "a string") -> str:
    """Return ``value`` if it is a string; ``what`` describes it in the message."""
    return check_instance(name, value, str, what)


def check_instance(name: str, value: _Value, kinds: type | tuple[type, ...], what: str) -> _Value:
    """Return ``value`` if it is of one of the types; ``what`` describes them in the message.

    Raises:
        TypeError: If ``value`` is of another type.

    Example:
        >>> check_instance("costs", 3, dict, "a dict of costs by layer")
        Traceback (most recent call last):
            ...
        TypeError: `costs` must be a dict of costs by layer, got 3 (int)
    """
    if not isinstance(value, kinds):
        raise TypeError(f"`{name}` must be {what}, got {shown(value)}")
    return value


def check_callable(name: str, value: _Value, what: str = "callable") -> _Value:
    """Return ``value`` if it is callable; ``what`` describes it in the message.

    Raises:
        TypeError: If ``value`` is not callable.
    """
    if not callable(value):
        raise TypeError(f"`{name}` must be {what}, got {shown(value)}")
    return value


def check_int(name: str, value: int) -> int:
    """Return ``value``, such as a seed or a position, if it is an int.

    Raises:
        TypeError: If ``value`` is not an int (or is a bool).
        ValueError: If ``value`` is beyond 64 bits.
    """
    if isinstance(value, bool) or not isinstance(value, int | Integral):
        raise TypeError(f"`{name}` must be an int, got {shown(value)}")
    number = value if type(value) is int else int(value)
    if not -_MOST <= number < _MOST:
        raise ValueError(f"`{name}` must be within 64 bits, got {shown(value)}")
    return number


def check_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``choices``; the error names the nearest choice.

    Args:
        name: The argument's name, for the message.
        value: The argument's value.
        choices: The allowed values, in the order in which the message lists them.

    Returns:
        ``value``, unchanged.

    Raises:
        TypeError: If ``value`` is not a string.
        ValueError: If ``value`` is not among ``choices``.

    Example:
        >>> check_choice("scope", "globl", ("global", "local"))
        Traceback (most recent call last):
            ...
        ValueError: `scope` must be 'global' or 'local', got 'globl'; did you mean 'global'?
    """
    known = list(choices)
    listed = " or ".join(filter(None, [", ".join(map(repr, known[:-1])), *map(repr, known[-1:])]))
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be {listed}, got {shown(value)}")
    if value not in known:
        near = nearest(value, known, limit=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"`{name}` must be {listed}, got {value!r}{hint}")
    return value


def check_positive_int(name: str, value: int) -> int:
    """Return ``value`` if it is an int of at least 1.

    Args:
        name: The argument's name, for the message.
        value: The argument's value.

    Returns:
        ``value``; an int of NumPy's as Python's.

    Raises:
        TypeError: If ``value`` is not an int (or is a bool).
        ValueError: If ``value`` is less than 1.

    Example:
        >>> check_positive_int("every_n_steps", 0)
        Traceback (most recent call last):
            ...
        ValueError: `every_n_steps` must be at least 1, got 0
    """
    return _check_int_from(name, value, 1)


def check_non_negative_int(name: str, value: int) -> int:
    """Return ``value`` if it is an int of at least 0; an int of NumPy's as Python's.

    Raises:
        TypeError: If ``value`` is not an int (or is a bool).
        ValueError: If ``value`` is negative.
    """
    return _check_int_from(name, value, 0)


def check_positive_number(name: str, value: float) -> float:
    """Return ``value`` if it is a finite int or float above 0.

    Args:
        name: The argument's name, for the message.
        value: The argument's value.

    Returns:
        ``value``; a number of NumPy's as an int or float.

    Raises:
        TypeError: If ``value`` is not a number (or is a bool).
        ValueError: If ``value`` is not above 0, NaN or infinite.

    Example:
        >>> check_positive_number("distortion", 0.0)
        Traceback (most recent call last):
            ...
        ValueError: `distortion` must be above 0, got 0.0
    """
    value = check_finite_number(name, value)
    if value <= 0:
        raise ValueError(f"`{name}` must be above 0, got {value!r}")
    return value


def check_fraction(name: str, value: float) -> float:
    """Return ``value`` if it lies in ``[0, 1]``.

    Args:
        name: The argument's name, for the message.
        value: The argument's value.

    Returns:
        ``value``; a number of NumPy's as an int or float.

    Raises:
        TypeError: If ``value`` is not a number (or is a bool).
        ValueError: If ``value`` is outside ``[0, 1]`` or NaN; for what looks like a percentage the fraction is
            suggested.

    Example:
        >>> check_fraction("until", 80)
        Traceback (most recent call last):
            ...
        ValueError: `until` must be in [0, 1], got 80; did you mean 0.8?
    """
    if not is_number(value):
        raise TypeError(f"`{name}` must be a number in [0, 1], got {shown(value)}")
    value = plain_number(value)
    if not 0 <= value <= 1:  # written so that NaN fails too
        hint = f"; did you mean {value / 100!r}?" if 2 <= value <= 100 else ""
        raise ValueError(f"`{name}` must be in [0, 1], got {value!r}{hint}")
    return value


def check_names(name: str, value: str | Iterable[str], choices: Iterable[str]) -> tuple[str, ...]:
    """Return one or several of ``choices``, each once.

    Raises:
        TypeError: If ``value`` is neither a string nor a collection of strings.
        ValueError: If one is not among ``choices``.
    """
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, bytes) or not isinstance(value, Sequence | Set):
        raise TypeError(f"`{name}` must be one or several of {', '.join(map(repr, choices))}, got {shown(value)}")
    return tuple(dict.fromkeys(check_choice(name, one, choices) for one in value))


def check_room(name: str, count: float) -> None:
    """Raise an error for an argument that would need an impossibly large tensor.

    Raises:
        ValueError: If ``count`` is more than ``2**40``.
    """
    if count > 2**40:
        raise ValueError(f"`{name}` must be small enough for memory, but asks for a tensor of {count:.1e} numbers")


def nearest(value: str, choices: Iterable[str], *, limit: int = 3) -> list[str]:
    """Return up to ``limit`` of ``choices`` similar to ``value``, closest first, ignoring case.

    Args:
        value: The requested name.
        choices: The existing names.
        limit: The maximum number of results.

    Returns:
        The closest choices; empty if none is close.

    Example:
        >>> nearest("Bacbone", ["head", "backbone"])
        ['backbone']
    """
    spelled = {choice.lower(): choice for choice in choices}
    return [spelled[near] for near in difflib.get_close_matches(value.lower(), spelled, n=limit, cutoff=0.5)]


def _check_int_from(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | Integral):
        hint = f"; did you mean {int(value)}?" if isinstance(value, float) and value.is_integer() else ""
        raise TypeError(f"`{name}` must be an int of at least {least}, got {shown(value)}{hint}")
    number = value if type(value) is int else int(value)
    if number < least:
        raise ValueError(f"`{name}` must be at least {least}, got {number}")
    if number >= _MOST:
        raise ValueError(f"`{name}` must be within 64 bits, got {shown(value)}")
    return number


def shown(value: object) -> str:
    """The value and its type, truncated, so that a tensor does not hide the message."""
    text = " ".join(repr(value).split())  # on one line
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
