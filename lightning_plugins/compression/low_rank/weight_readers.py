"""Layers whose attributes other code reads: they cannot become a sequence of two layers.

The attention of BEiT computes ``F.linear(x, self.qkv.weight, ...)``, and some models look at ``self.proj.weight.dtype``
before they call `proj`. A sequence has neither a weight nor features, so such a layer must stay what it is. What a
module's forward pass reads is looked up in its source: chains of attributes that begin with ``self``, in the methods
that are reached from ``forward`` and the steps of a training loop. Reads through another variable are not seen.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn

_ENTRIES = ("forward", "training_step", "validation_step", "test_step", "predict_step")
_SEQUENCE = nn.Sequential()


def readers(model: nn.Module) -> dict[nn.Module, str]:
    """Find the layers whose attributes are read from outside in a forward pass.

    Args:
        model: The model.

    Returns:
        By layer, who reads what, as a message says it.

    Example:
        >>> encoder = nn.TransformerEncoderLayer(4, 2, 8)
        >>> readers(encoder)[encoder.linear1]
        '`TransformerEncoderLayer.forward` reads its `weight`'
    """
    found: dict[nn.Module, str] = {}
    ahead = [(module, entry) for module in model.modules() for entry in _ENTRIES]
    seen = set(ahead)
    while ahead:
        module, method = ahead.pop()
        kind: Any = type(module)
        for chain in _chains(kind, method):
            owner, rest = _walk(module, chain)
            if not rest:
                continue
            below: Any = type(owner)
            if (owner, rest[0]) not in seen and _definitions(below, rest[0]):
                seen.add((owner, rest[0]))
                ahead.append((owner, rest[0]))
            if owner is not module and hasattr(owner, rest[0]) and not hasattr(_SEQUENCE, rest[0]):
                found.setdefault(owner, f"`{kind.__name__}.{method}` reads its `{rest[0]}`")
    return found


def _walk(module: nn.Module, chain: tuple[str, ...]) -> tuple[nn.Module, tuple[str, ...]]:
    """Follow a chain of attributes through submodules, and return the rest of it at the last one."""
    for index, segment in enumerate(chain):
        child = module._modules.get(segment)
        if child is None:
            return module, chain[index:]
        module = child
    return module, ()


@cache
def _chains(kind: type, method: str) -> tuple[tuple[str, ...], ...]:
    """The attributes that a method reads, such as ``("patch_embed", "proj", "weight")``, each once."""
    found: dict[tuple[str, ...], None] = {}
    for function in _definitions(kind, method):
        for node in ast.walk(_parsed(function)):
            if isinstance(node, ast.Attribute):
                chain = _chain(node)
                if chain is not None:
                    found[chain] = None
    return tuple(found)


def _chain(node: ast.expr) -> tuple[str, ...] | None:
    """Return the names after ``self`` in ``self.layers[0].weight``; None for a chain that begins otherwise."""
    segments: list[str] = []
    while True:
        match node:
            case ast.Attribute(value=below, attr=name):
                segments.append(name)
            case ast.Subscript(value=below, slice=ast.Constant(value=int() | str() as index)):
                segments.append(str(index))
            case ast.Name(id="self"):
                return tuple(reversed(segments))
            case _:
                return None
        node = below


@cache
def _definitions(kind: type, method: str) -> tuple[FunctionType, ...]:
    """The function behind a method or property, and those of base classes that it may call through ``super()``."""
    return tuple(_search(kind, method))


def _search(kind: type, method: str) -> Iterator[FunctionType]:
    for base in kind.__mro__:
        if base is nn.Module:
            return
        defined: Any = vars(base).get(method)
        function: Any = inspect.unwrap(getattr(defined, "fget", defined))  # of a property what computes it
        if not isinstance(function, FunctionType):
            continue
        yield function
        names = {node.id for node in ast.walk(_parsed(function)) if isinstance(node, ast.Name)}
        if "super" not in names:
            return


@cache
def _parsed(function: FunctionType) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):  # written in a console, or generated
        return ast.Module(body=[], type_ignores=[])
