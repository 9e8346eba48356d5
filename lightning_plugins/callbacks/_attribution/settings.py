"""The methods that were asked for, and the modules they are about."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_plugins._checks import check_choice, nearest
from lightning_plugins._lightning import LightningModule, MisconfigurationException
from lightning_plugins.callbacks._attribution.methods import METHODS, WITH_LAYER, Call, known_options
from lightning_plugins.functional.attribution.positions import maps_of_inputs
from lightning_plugins.functional.attribution.scoring import Explain

Methods = str | Sequence[str] | Mapping[str, str | Mapping[str, Any] | Callable[[Tensor, Tensor], Tensor] | None]


def check_methods(methods: Methods) -> dict[str, dict[str, Any] | Explain]:
    """Return by name the options of a method of Captum's, or a callable.

    Args:
        methods: See `AttributionEvaluation`.

    Returns:
        Options with ``"method"`` and, where it needs one, ``"layer"``; or the callable.

    Raises:
        TypeError: If something among them is of the wrong type.
        ValueError: If there is none, a name is not known, or a layer is missing.
    """
    if isinstance(methods, str):
        methods = [methods]
    if not isinstance(methods, Mapping):
        if not isinstance(methods, Sequence):
            raise TypeError(
                f"`methods` must be names, or a mapping as in {{'mine': function}}, got {type(methods).__name__}"
            )
        methods = dict.fromkeys(methods)
    if not methods:
        raise ValueError(f"`methods` must have at least one method, got none; by name there are {', '.join(METHODS)}")
    return {name: _checked(name, value) for name, value in methods.items()}


def find_network(pl_module: LightningModule, name: str | None) -> nn.Module:
    """The module that maps inputs to logits.

    Args:
        pl_module: The LightningModule.
        name: Dotted name of a submodule, or None for itself.

    Returns:
        The module.

    Raises:
        MisconfigurationException: If there is none of this name.
    """
    return pl_module if name is None else _find(pl_module, "network", name)


def method_calls(
    methods: Mapping[str, dict[str, Any] | Explain], network: nn.Module, *, limit: int
) -> dict[str, tuple[str, Call] | Explain]:
    """By name, Captum's name and what its method is built with, or the callable.

    Args:
        methods: As `check_methods` returns them.
        network: Maps inputs to logits.
        limit: The largest number of inputs in one forward pass.

    Returns:
        What `build_method` takes, or callables.

    Raises:
        MisconfigurationException: If the network has no such layer.
    """
    calls: dict[str, tuple[str, Call] | Explain] = {}
    for name, value in methods.items():
        if not isinstance(value, dict):
            calls[name] = value
            continue
        options = dict(value)
        method, layer = options.pop("method"), options.pop("layer", None)
        found = None if layer is None else _find(network, f"methods[{name!r}]['layer']", layer)
        calls[name] = method, Call(network, found, options, limit, seed=options.pop("seed", 0))
    return calls


def named(name: str, explain: Explain) -> Explain:
    """A user-defined method, with checks of its maps.

    Args:
        name: Its name.
        explain: Maps inputs and classes to attributions.

    Returns:
        The method, raising a `MisconfigurationException` for results that are not maps of its inputs.
    """

    def checked(inputs: Tensor, target: Tensor) -> Tensor:
        maps: object = explain(inputs, target)
        if not isinstance(maps, Tensor) or not maps.is_floating_point():
            got = str(maps.dtype) if isinstance(maps, Tensor) else type(maps).__name__
            raise MisconfigurationException(f"`methods[{name!r}]` must return a floating tensor, got {got}")
        try:
            maps_of_inputs(maps, inputs)
        except ValueError as error:
            raise MisconfigurationException(
                f"`methods[{name!r}]` must return maps of its inputs' shape {tuple(inputs.shape)}, with any number of"
                f" channels or without, got {tuple(maps.shape)}"
            ) from error
        return maps

    return checked


def _checked(name: str, value: object) -> dict[str, Any] | Explain:
    if not isinstance(name, str):
        raise TypeError(
            f"`methods` must have strings as names, got {name!r} ({type(name).__name__}); callables go in a mapping,"
            " {'mine': function}"
        )
    if isinstance(value, nn.Module) and name in METHODS:
        raise TypeError(f"`methods[{name!r}]` must be the name of a layer, a string, got {type(value).__name__} itself")
    if callable(value):
        return value
    if isinstance(value, str):
        value = {"layer": value}
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(
            f"`methods[{name!r}]` must be a layer's name, a mapping of options, a callable or None, got"
            f" {type(value).__name__}{'; give its `attribute`' if hasattr(value, 'attribute') else ''}"
        )
    options = {"method": name, **(value or {})}
    method = check_choice("methods", options["method"], METHODS)
    if method in WITH_LAYER and not isinstance(options.get("layer"), str):
        raise ValueError(
            f"`methods[{name!r}]` needs the name of a layer, as in {{{name!r}: 'layer4'}}: the last one with positions"
        )
    if method not in WITH_LAYER and "layer" in options:
        raise ValueError(f"`methods[{name!r}]` takes no layer, got {options['layer']!r}")
    known = known_options(method)
    if unknown := [option for option in options if option not in known]:
        near = nearest(unknown[0], known, limit=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(known))}"
        raise ValueError(f"`methods[{name!r}]` has no option {unknown[0]!r}; {hint}")
    return options


def _find(root: nn.Module, argument: str, name: str) -> nn.Module:
    known = dict(root.named_modules())
    if name not in known or not name:
        near = nearest(name, filter(None, known), limit=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise MisconfigurationException(f"`{argument}={name!r}` is not a module of {type(root).__name__}{hint}")
    found: nn.Module = known[name]
    return found
