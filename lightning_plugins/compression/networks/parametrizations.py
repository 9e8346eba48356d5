"""Put parametrizations on weights and take them off again, without a trace."""

import copy
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_plugins.compression.networks.arguments import check_module
from lightning_plugins.selection import WRAPPERS


def clean_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules, the model itself included, by names without the segments of compilation and checkpointing."""
    check_module(model)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[clean_name(name)] = module  # a wrapper comes before the wrapped module, which holds the parameters
    return found


def clean_name(name: str) -> str:
    """A dotted name without the segments of compilation and checkpointing."""
    return ".".join(segment for segment in name.split(".") if segment not in WRAPPERS)


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of a model without the wrappers of compilation and checkpointing, so that names are clean."""
    holder = nn.ModuleDict({"root": copy.deepcopy(model)})
    for parent in list(holder.modules()):
        for key, child in parent._modules.items():
            for wrapper in sorted(WRAPPERS):
                child = child if child is None else child._modules.get(wrapper) or child
            parent._modules[key] = child
    return holder["root"]


def put_on(module: nn.Module, name: str, parametrization: nn.Module) -> None:
    """Compute a parameter of a module from the original by one more step.

    Args:
        module: The module.
        name: The parameter's name in it.
        parametrization: The step.
    """
    module.__dict__.setdefault("_parameter_order", list(module._parameters))
    parametrize.register_parametrization(module, name, parametrization, unsafe=True)


def take_off(module: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...], *, bake: bool) -> None:
    """Take the steps of certain kinds off all parameters of a module; the parameters stay the objects they were.

    Args:
        module: The module.
        kinds: The classes of the steps.
        bake: Whether the parameters get the values that were computed from them.
    """
    if not parametrize.is_parametrized(module):
        return
    lists = dict(cast("nn.ModuleDict", module.parametrizations).items())
    ours = {
        name: [i for i, step in enumerate(_steps(parts)) if isinstance(step, kinds)] for name, parts in lists.items()
    }
    if any(ours.values()):
        _own_class(module)
    for name, places in ours.items():
        steps: Any = lists[name]
        if bake and places:
            with torch.no_grad():
                steps.original.copy_(_computed(steps, kinds))
        if places and len(places) == len(steps):
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        else:
            for i in reversed(places):
                del steps[i]
    order = module.__dict__.get("_parameter_order")
    if order is not None and not parametrize.is_parametrized(module):
        del module.__dict__["_parameter_order"]
        module._parameters.update({name: module._parameters.pop(name) for name in order if name in module._parameters})


def _steps(parts: nn.Module) -> Iterable[nn.Module]:
    return cast("nn.ModuleList", parts)


def _own_class(module: nn.Module) -> None:
    """Give a module a class of its own: a copy shares the one torch made, and a removal takes attributes from it."""
    shared = type(module)
    inside = {key: value for key, value in vars(shared).items() if key not in {"__dict__", "__weakref__"}}
    module.__class__ = type(shared.__name__, shared.__bases__, inside)


def _computed(steps: Any, kinds: type[nn.Module] | tuple[type[nn.Module], ...]) -> Tensor:
    value: Tensor = steps.original
    for step in steps:
        if isinstance(step, kinds):
            value = step(value)
    return value
