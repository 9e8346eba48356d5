"""Argument checks of an inner loop: adapted parameters, preconditioner, step weights."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_plugins._checks import check_bool, check_finite_number, shown
from lightning_plugins.meta.loop.structure import leaves
from lightning_plugins.meta.preconditioners import Identity, Preconditioner, few, key
from lightning_plugins.selection import TensorRef, select_modules, select_tensors


def check_first_order(value: bool) -> bool:
    """Return ``value`` if it is a bool: a string such as "False" would be truthy."""
    return check_bool("first_order", value)


def adapted_parameters(model: nn.Module, layers: str | Sequence[str] | None) -> dict[str, Tensor]:
    """The parameters that require a gradient, of the selected layers or of all, by dotted name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch module, got {type(model).__name__}")
    modules = [model] if layers is None else list(select_modules(model, layers).values())
    chosen = {id(parameter) for module in modules for parameter in module.parameters()}
    found: dict[str, Tensor] = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in chosen and parameter.requires_grad
    }
    if not found:
        where = "`model`" if layers is None else f"`layers`: {layers!r}"
        raise ValueError(f"{where} must have parameters that require a gradient, got {len(chosen)} that do not")
    return found


def initialised(preconditioner: Preconditioner | None, parameters: dict[str, Tensor], steps: int) -> Preconditioner:
    """Initialise the preconditioner's parameters, unless another loop already has."""
    if preconditioner is None:
        return Identity()
    if not isinstance(preconditioner, Preconditioner):
        got = preconditioner.__name__ if isinstance(preconditioner, type) else type(preconditioner).__name__
        hint = f"; did you mean `{got}()`?" if isinstance(preconditioner, type) else ""
        raise TypeError(f"`preconditioner` must be a `Preconditioner`, got {got}{hint}")
    if preconditioner.initialised:
        name = type(preconditioner).__name__
        raise ValueError(f"`preconditioner` must be new, got a {name} that belongs to another loop; make another one")
    preconditioner.initialise(parameters, steps)
    preconditioner.initialised = True
    return preconditioner


def learned_rates(adapted: dict[str, Tensor], rates: str, steps: int, initial: float) -> nn.ParameterDict:
    """A learned rate per adapted tensor, or per tensor and step, or none if they are fixed."""
    learned = nn.ParameterDict()
    for name, parameter in adapted.items() if rates != "fixed" else ():
        shape = (steps,) if rates == "learned_per_step" else ()
        learned[key(name)] = nn.Parameter(parameter.detach().new_full(shape, float(initial)))
    return learned


def weights_of_steps(weights: Sequence[float] | None, steps: int) -> list[float]:
    """A weight for the query loss after every step; without steps, one for the unadapted model."""
    if weights is None:
        return [0.0] * (steps - 1) + [1.0]
    if isinstance(weights, str | bytes) or not isinstance(weights, Sequence):
        raise TypeError(f"`step_weights` must be a sequence of numbers, got {shown(weights)}")
    if len(weights) != steps:
        raise ValueError(f"`step_weights` must have one number per step, {steps}, got {len(weights)}")
    checked = [check_finite_number("step_weights", weight) for weight in weights]
    if not any(checked):
        raise ValueError(f"`step_weights` must not all be zero, got {list(weights)}")
    return checked


def check_layer(model: nn.Module, layer: str, name: str = "layer") -> TensorRef:
    """The single tensor selected by a layer name."""
    if not isinstance(layer, str):
        raise TypeError(f"`{name}` must be the name of a module, got {type(layer).__name__}")
    references = select_tensors(model, layer)
    if len(references) > 1:
        raise ValueError(f"`{name}` must name one module, got {layer!r}, which is {few(r.label for r in references)}")
    return references[0]


def check_adapted(adapted: Mapping[str, Tensor], names: Sequence[str], inputs: object) -> None:
    """Raise an error for parameters with other names or another number of tasks than the inputs."""
    if missing := [name for name in names if name not in adapted]:
        raise ValueError(f"`adapted` must be what `adapt` returned, got no {few(missing)}")
    tasks = len(adapted[names[0]])
    shapes = [tuple(leaf.shape) for leaf in leaves(inputs)] if not isinstance(inputs, list) else [(len(inputs),)]
    if any(len(adapted[name]) != tasks for name in names) or any(shape[:1] != (tasks,) for shape in shapes):
        raise ValueError(f"`inputs` must have the {tasks} tasks of `adapted`, got {' and '.join(map(str, shapes))}")


def check_updates(updates: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Raise an error for updates that do not match the gradients."""
    for name, gradient in gradients.items():
        if name not in updates:
            raise ValueError(f"`preconditioner` must return an update for {name!r}, got {few(updates) or 'none'}")
        if updates[name].shape != gradient.shape:
            raise ValueError(
                f"`preconditioner` must return an update of shape {tuple(gradient.shape)} for {name!r},"
                f" got {tuple(updates[name].shape)}"
            )
    return updates
