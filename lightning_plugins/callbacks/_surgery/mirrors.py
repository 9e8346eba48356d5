"""Copies of parameters that a module keeps of its own accord, which no surgery makes smaller."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lightning_plugins._lightning import LightningModule, rank_zero_warn

_FEWEST = 3  # tensors of the shapes of parameters, in their order, that are no coincidence


def warn_of_mirrors(name: str, pl_module: LightningModule) -> None:
    """Say before a training which attributes look like copies of parameters: averages, teachers, anchors.

    Args:
        name: Of the callback that will change the network.
        pl_module: The module.
    """
    found = sorted(set(_mirrors(pl_module)))
    if found:
        rank_zero_warn(
            f"{name}: {', '.join(map(repr, found[:3]))} of {type(pl_module).__name__} mirror parameters (an average of "
            "weights, a teacher?), which the surgery will replace: copy them again after it (compare "
            "shapes in a hook, or start the average after it), or code that pairs them will fail"
        )


def _mirrors(pl_module: LightningModule) -> Iterator[str]:
    shapes = [tuple(parameter.shape) for parameter in pl_module.parameters() if parameter.requires_grad]
    for owner, module in pl_module.named_modules():
        for key, value in vars(module).items():
            if not key.startswith("_") and _pairs(list(_tensors(value)), shapes):
                yield f"{owner}.{key}".removeprefix(".")
        buffers = [tuple(b.shape) for b in module._buffers.values() if b is not None]
        if _pairs(buffers, shapes):
            yield owner or "its buffers"
    yield from _twins(pl_module)


def _pairs(found: list[tuple[int, ...]], shapes: list[tuple[int, ...]]) -> bool:
    """Return whether shapes occur consecutively among those of the parameters."""
    count = len(found)
    if count < min(_FEWEST, len(shapes)) or not count:
        return False
    return any(shapes[start : start + count] == found for start in range(len(shapes) - count + 1))


def _tensors(value: Any) -> Iterator[tuple[int, ...]]:
    if isinstance(value, Tensor):
        yield tuple(value.shape)
    elif isinstance(value, nn.Module):  # one that stands in a list, so that it is not a submodule
        yield from (tuple(parameter.shape) for parameter in value.parameters())
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _twins(pl_module: LightningModule) -> Iterator[str]:
    """Submodules that do not train and have the parameters, by name and shape, of one that does."""
    seen: dict[Any, str] = {}
    frozen: list[tuple[Any, str]] = []
    for name, module in pl_module.named_modules():
        parameters = list(module.named_parameters())
        if not name or len(parameters) < 2:
            continue
        key = tuple((own, tuple(p.shape)) for own, p in parameters)
        if any(p.requires_grad for _, p in parameters):
            seen.setdefault(key, name)
        else:
            frozen.append((key, name))
    below: list[str] = []
    for key, name in frozen:
        if key in seen and not any(name.startswith(f"{other}.") for other in below):
            below.append(name)
            yield name
