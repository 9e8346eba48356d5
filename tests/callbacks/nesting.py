"""Flat settings of a callback, as tests write them, gathered in the dataclasses that the callback takes."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def gathered(settings: Mapping[str, Any], kinds: Mapping[str, type]) -> dict[str, Any]:
    """Return arguments of a callback, with settings that are fields of a dataclass gathered in it."""
    given = dict(settings)
    for name, kind in kinds.items():
        own = {field.name: given.pop(field.name) for field in fields(kind) if field.name in given}
        if own:
            given[name] = kind(**own)
    return given
