"""Selection of layers: dotted names, globs over dotted names and module types; errors suggest close matches.

``layers`` is a dotted module name (``"backbone.fc"``), a glob over dotted names whose ``*`` also matches dots
(``"net*"`` selects all names that start with ``net``), or a sequence of these. For tensors rather than weights,
``"name:input"`` selects a layer's input and ``"name:output"`` (the default) its output.

Name segments added by ``torch.compile`` and activation checkpointing are ignored: ``"backbone.fc"`` finds
``backbone._orig_mod.fc``, and returned names do not contain them.
"""

import re
from collections.abc import Iterable, Sequence
from fnmatch import translate
from typing import Literal, NamedTuple

from torch import nn

from lightning_plugins._checks import check_instance, nearest

Side = Literal["input", "output"]
SIDES: tuple[Side, ...] = ("input", "output")

WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}  # torch.compile; activation checkpointing


class TensorRef(NamedTuple):
    """The input or the output of one module of a model.

    Attributes:
        name: The module's dotted name, without wrapper segments and without a side.
        module: The module on which a forward hook sees the tensor.
        side: ``"input"`` or ``"output"``.
    """

    name: str
    module: nn.Module
    side: Side

    @property
    def label(self) -> str:
        """The name with its side as users write it: ``"fc:input"``, or ``"fc"`` for the output."""
        return self.name if self.side == "output" else f"{self.name}:{self.side}"


def split_side(layer: str) -> tuple[str, Side]:
    """Split ``"name:input"`` or ``"name:output"`` into the name and the side; no suffix means the output.

    Args:
        layer: A dotted name or glob, with or without a suffix.

    Returns:
        The name and the side.

    Raises:
        ValueError: If the suffix is neither ``:input`` nor ``:output``.

    Example:
        >>> split_side("backbone.fc:input"), split_side("backbone.fc")
        (('backbone.fc', 'input'), ('backbone.fc', 'output'))
    """
    name, colon, side = layer.rpartition(":")
    if not colon:
        return layer, "output"
    for known in SIDES:
        if side == known:
            return name, known
    hint = "".join(f"; did you mean {name + ':' + near!r}?" for near in nearest(side, SIDES, limit=1))
    raise ValueError(f"`layers`: 'input' or 'output' must follow ':', got {layer!r}{hint}")


def check_layers(layers: str | Sequence[str], *, sides: bool = True) -> tuple[str, ...]:
    """Check what can be checked without a model: ``layers`` is a non-empty string or sequence of them.

    Args:
        layers: A dotted name, a glob, or a sequence of them.
        sides: Whether names may end in ``:input`` or ``:output`` (meaningless for weights).

    Returns:
        The names and globs, suffixes included.

    Raises:
        TypeError: If ``layers`` is neither a string nor a sequence of strings.
        ValueError: If it is empty, a name is empty, or a suffix is invalid.

    Example:
        >>> check_layers("backbone.fc:input")
        ('backbone.fc:input',)
    """
    rule = "`layers` must be a module name, a glob, or a list of them"
    if not isinstance(layers, Sequence):
        raise TypeError(f"{rule}, got {type(layers).__name__}")
    chosen = (layers,) if isinstance(layers, str) else tuple(layers)
    if not chosen:
        raise ValueError(f"{rule}, got an empty {type(layers).__name__}; '*' takes every layer")
    for layer in chosen:
        if not isinstance(layer, str):
            raise TypeError(f"{rule}, got one with {layer!r} ({type(layer).__name__}) in it")
        if not sides and layer.endswith((":input", ":output")):
            raise ValueError(f"`layers` takes the weights of a layer here, not its input or output: got {layer!r}")
        if not (split_side(layer)[0] if sides else layer):
            raise ValueError(f"{rule}, got {layer!r}, which would be the whole model; name one of its layers")
    return chosen


def select_modules(
    model: nn.Module, layers: str | Sequence[str], *, types: Iterable[type[nn.Module]] | None = None
) -> dict[str, nn.Module]:
    """Find the modules selected by ``layers``, for work on their weights.

    Args:
        model: The model; its own name, ``""``, cannot be chosen.
        layers: A dotted name, a glob, or a sequence of them, without sides.
        types: Supported module types; other modules matched by a glob are skipped. ``None`` for all.

    Returns:
        Modules by clean dotted name, in the model's order. A module matched by several patterns, or used at several
        places of the model, is returned once, under its first name. For a wrapper the wrapped module is returned.

    Raises:
        ValueError: If a name or glob matches nothing, or no module of the supported ``types``.
        TypeError: If ``layers`` is neither a string nor a sequence of strings.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> select_modules(net, "*", types=[nn.Linear])
        {'0': Linear(in_features=4, out_features=8, bias=True), '2': Linear(in_features=8, out_features=2, bias=True)}
    """
    patterns = check_layers(layers, sides=False)
    kinds = None if types is None else tuple(types)
    modules = _named_modules(model, wrapped=True)
    chosen: set[str] = set()
    for pattern in patterns:
        matches = _match(pattern, modules)
        supported = [name for name in matches if kinds is None or isinstance(modules[name], kinds)]
        if not supported:
            wanted = ", ".join(sorted(kind.__name__ for kind in kinds or ()))
            found = _few(_type_names(modules, matches), "type")
            raise ValueError(f"`layers`: {pattern!r} must match modules of the types {wanted}, got {found}")
        chosen.update(supported)
    first = {id(module): name for name, module in reversed(modules.items()) if name in chosen}
    return {name: modules[name] for name in modules if first.get(id(modules[name])) == name}


def select_kept(
    model: nn.Module, keep: str | Sequence[str] | None, *, types: Iterable[type[nn.Module]] | None = None
) -> set[str]:
    """Find the modules selected by ``keep``, like `select_modules`.

    Args:
        model: The model.
        keep: Names and globs of modules to leave unchanged; None or empty for none.
        types: As for `select_modules`.

    Returns:
        Clean dotted names.

    Raises:
        ValueError: As `select_modules`.
        TypeError: As `select_modules`.

    Example:
        >>> select_kept(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), "0")
        {'0'}
    """
    if keep is None or (isinstance(keep, Sequence) and not len(keep)):
        return set()
    try:
        return set(select_modules(model, keep, types=types))
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("`layers`", "`keep`")) from None


def select_tensors(model: nn.Module, layers: str | Sequence[str]) -> list[TensorRef]:
    """Find the inputs and outputs selected by ``layers``, for forward hooks.

    Args:
        model: The model; its own name, ``""``, cannot be chosen.
        layers: A dotted name, a glob, or a sequence of them, each optionally followed by
            ``:input`` or ``:output`` (default). Globs skip modules that are never called (such as ``ModuleList``) and
            parametrizations of weights.

    Returns:
        One reference per tensor, in the model's order, a layer's input before its output; duplicates are removed. For a
        wrapped layer the reference holds the wrapper: its hooks run outside the compiled or recomputed part.

    Raises:
        ValueError: If a name or glob matches nothing, a suffix is wrong, or a named module is never called.
        TypeError: If ``layers`` is neither a string nor a sequence of strings.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [ref.label for ref in select_tensors(net, ["2:input", "0"])]
        ['0', '2:input']
    """
    patterns = check_layers(layers, sides=True)
    modules = _named_modules(model, wrapped=False)
    chosen: dict[tuple[str, Side], None] = {}
    for pattern in patterns:
        name, side = split_side(pattern)
        matches = _match(name, modules)
        if name not in modules:  # a glob
            matches = [match for match in matches if "parametrizations" not in match.split(".")]
        called = [match for match in matches if is_called(modules[match])]
        if not called:
            found = _few(_type_names(modules, matches), "type")
            inside = [below for below in modules if below.startswith(f"{name}.")]
            hint = f"; in it are {_few(inside, 'module')}" if inside else ""
            raise ValueError(f"`layers`: {name!r} must match modules that a forward pass calls, got {found}{hint}")
        chosen.update(((match, side), None) for match in called)
    refs: dict[tuple[int, Side], TensorRef] = {}
    for name, module in modules.items():
        for side in SIDES:
            if (name, side) in chosen:
                refs.setdefault((id(module), side), TensorRef(name, module, side))
    return list(refs.values())


def _named_modules(model: nn.Module, *, wrapped: bool) -> dict[str, nn.Module]:
    """All modules but the root by clean name; ``wrapped`` selects the wrapped module rather than the wrapper."""
    check_instance("model", model, nn.Module, "a torch.nn.Module")
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):  # a shared module has several names
        clean = ".".join(segment for segment in name.split(".") if segment not in WRAPPERS)
        if wrapped:
            modules[clean] = module  # a wrapper comes before the wrapped module
        else:
            modules.setdefault(clean, module)
    modules.pop("", None)
    return modules


def _match(pattern: str, modules: dict[str, nn.Module]) -> list[str]:
    if pattern in modules:  # before globs, since a name may contain a bracket
        return [pattern]
    clean = ".".join(segment for segment in pattern.split(".") if segment not in WRAPPERS)
    if clean in modules:  # a name copied from a compiled model
        return [clean]
    glob = re.compile(translate(pattern))
    matches = [name for name in modules if glob.match(name)]
    if not matches:
        near = _meant(pattern, modules) or nearest(pattern.replace("*", ""), modules)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"`layers`: no module is called {pattern!r}{hint}; it has {_few(list(modules), 'module')}")
    return matches


def _meant(pattern: str, modules: dict[str, nn.Module]) -> list[str]:
    """Names that differ by the enclosing module's name, or by a dot before the side."""
    name, _, side = pattern.rpartition(".")
    if side in SIDES and name in modules:
        return [f"{name}:{side}"]
    within = [known for known in modules if known.endswith(f".{pattern}")]
    outside = [known for known in modules if pattern.endswith(f".{known}")]
    return sorted(outside, key=len, reverse=True)[:1] or within[:3]


def is_called(module: nn.Module) -> bool:
    """Tell whether a module defines a forward; module lists and dicts do not, so their hooks never run.

    Returns:
        True if it does.

    Example:
        >>> is_called(nn.Sequential()), is_called(nn.ModuleList())
        (True, False)
    """
    return getattr(module.forward, "__func__", None) is not nn.Module.forward


def _type_names(modules: dict[str, nn.Module], names: Iterable[str]) -> list[str]:
    return sorted({type(modules[name]).__name__ for name in names})


def _few(names: Sequence[str], kind: str) -> str:
    """The first and last few names, and their number."""
    if len(names) <= 6:
        return ", ".join(names) or f"no {kind}"
    return f"{', '.join(names[:3])}, …, {', '.join(names[-2:])} ({len(names)} {kind}s)"


def module_at(model: nn.Module, name: str) -> nn.Module | None:
    """Return the module with a given name in a model, ignoring wrapper segments.

    Args:
        model: The model.
        name: A current or earlier name in ``model.named_modules()``.

    Returns:
        The module; None if it no longer exists.

    Example:
        >>> module_at(nn.Sequential(nn.Linear(2, 3)), "0")
        Linear(in_features=2, out_features=3, bias=True)
    """
    module: nn.Module | None = model
    for part in name.split(".") if name else ():
        module = module._modules.get(part) if module is not None else None
    return module
