"""Small checks of arguments: each returns the value it was given, or says what was wrong with it."""

import difflib
import math
from collections.abc import Iterable


def check_finite_number(name: str, value: float) -> float:
    """Return ``value`` if it is a finite int or float.

    Args:
        name: The argument's name, for the message.
        value: The argument's value.

    Returns:
        ``value``, unchanged.

    Raises:
        TypeError: If ``value`` is not an int or float (a bool is neither).
        ValueError: If ``value`` is NaN or infinite.

    Example:
        >>> check_finite_number("weight", -0.1)
        -0.1
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a number, got {_shown(value)}")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value!r}")
    return value


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
        raise TypeError(f"`{name}` must be True or False, got {_shown(value)}")
    return value


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
        raise TypeError(f"`{name}` must be {listed}, got {_shown(value)}")
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
        ``value``, unchanged.

    Raises:
        TypeError: If ``value`` is not an int (a bool is not).
        ValueError: If ``value`` is less than 1.

    Example:
        >>> check_positive_int("every_n_steps", 0)
        Traceback (most recent call last):
            ...
        ValueError: `every_n_steps` must be at least 1, got 0
    """
    return _check_int_from(name, value, 1)


def check_non_negative_int(name: str, value: int) -> int:
    """Return ``value`` if it is an int of at least 0.

    Args:
        name: The argument's name, for the message.
        value: The argument's value.

    Returns:
        ``value``, unchanged.

    Raises:
        TypeError: If ``value`` is not an int (a bool is not).
        ValueError: If ``value`` is negative.

    Example:
        >>> check_non_negative_int("queue_size", 0)
        0
    """
    return _check_int_from(name, value, 0)


def check_positive_number(name: str, value: float) -> float:
    """Return ``value`` if it is a finite int or float above 0.

    Args:
        name: The argument's name, for the message.
        value: The argument's value.

    Returns:
        ``value``, unchanged.

    Raises:
        TypeError: If ``value`` is not an int or float (a bool is neither).
        ValueError: If ``value`` is not above 0, NaN or infinite.

    Example:
        >>> check_positive_number("distortion", 0.0)
        Traceback (most recent call last):
            ...
        ValueError: `distortion` must be above 0, got 0.0
    """
    if check_finite_number(name, value) <= 0:
        raise ValueError(f"`{name}` must be above 0, got {value!r}")
    return value


def check_fraction(name: str, value: float) -> float:
    """Return ``value`` if it lies in ``[0, 1]``.

    Args:
        name: The argument's name, for the message.
        value: The argument's value.

    Returns:
        ``value``, unchanged.

    Raises:
        TypeError: If ``value`` is not an int or float (a bool is neither).
        ValueError: If ``value`` is outside ``[0, 1]`` or NaN; a value that reads like percent is told so.

    Example:
        >>> check_fraction("until", 80)
        Traceback (most recent call last):
            ...
        ValueError: `until` must be in [0, 1], got 80; did you mean 0.8?
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a number in [0, 1], got {_shown(value)}")
    if not 0 <= value <= 1:  # written so that NaN fails too
        hint = f"; did you mean {value / 100!r}?" if 1 < value <= 100 else ""
        raise ValueError(f"`{name}` must be in [0, 1], got {value!r}{hint}")
    return value


def nearest(value: str, choices: Iterable[str], *, limit: int = 3) -> list[str]:
    """Return up to ``limit`` of ``choices`` that look like ``value``, nearest first, whatever the case.

    Args:
        value: What was asked for.
        choices: What there is.
        limit: The largest number of answers.

    Returns:
        The nearest choices; empty if none is near.

    Example:
        >>> nearest("Bacbone", ["head", "backbone"])
        ['backbone']
    """
    spelled = {choice.lower(): choice for choice in choices}
    return [spelled[near] for near in difflib.get_close_matches(value.lower(), spelled, n=limit, cutoff=0.5)]


def _check_int_from(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        hint = f"; did you mean {int(value)}?" if isinstance(value, float) and value.is_integer() else ""
        raise TypeError(f"`{name}` must be an int of at least {least}, got {_shown(value)}{hint}")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}")
    return value


def _shown(value: object) -> str:
    """The value and its type, cut short: a whole tensor in a message hides the message."""
    text = " ".join(repr(value).split())  # on one line
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
