"""Share of a network that a choice of layers leaves out of reach."""

from collections.abc import Iterable, Sequence

from torch import nn

from lightning_plugins.compression.networks.parametrizations import clean_modules
from lightning_plugins.selection import select_modules

_WORTH_SAYING = 0.05  # of the network's parameters


def untouched(model: nn.Module, layers: str | Sequence[str], touched: Iterable[str], kept: Iterable[str] = ()) -> str:
    """Say which weights stay whole although the names and globs of layers match them.

    Args:
        model: The model, dense.
        layers: The names and globs.
        touched: The names of parameters, or of layers, that can become smaller.
        kept: The names of layers that stay whole on purpose.

    Returns:
        A sentence, or nothing if such weights hold less than a twentieth of the parameters.
    """
    reached, wanted = set(touched), set(kept)
    modules, total = clean_modules(model), sum(parameter.numel() for parameter in model.parameters())
    counted: set[int] = set()
    found: dict[str, int] = {}
    for name in select_modules(model, layers):
        for key, parameter in modules[name]._parameters.items():
            if parameter is None or parameter.ndim < 2 or id(parameter) in counted:
                continue
            counted.add(id(parameter))
            if name not in reached | wanted and f"{name}.{key}" not in reached:
                found[name] = found.get(name, 0) + parameter.numel()
    if not total or sum(found.values()) < _WORTH_SAYING * total:
        return ""
    largest = sorted(found, key=lambda name: -found[name])
    few = ", ".join(f"{name!r} ({type(modules[name]).__name__})" for name in largest[:3])
    more = f" and {len(largest) - 3} more" if len(largest) > 3 else ""
    return f"{few}{more} are kept whole and hold {sum(found.values()) / total:.0%} of the network's parameters"
