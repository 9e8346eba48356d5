"""Residual blocks that a network can do without: found in a forward pass, tried on a copy, removed."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_plugins.compression.channels.group import ChannelGroup, ChannelSearch
from lightning_plugins.compression.channels.skipped import Skipped, first_tensor, skip_modules
from lightning_plugins.compression.channels.verify import tried
from lightning_plugins.compression.costs.layer_costs import run
from lightning_plugins.compression.networks.arguments import check_example
from lightning_plugins.compression.networks.parametrizations import clean_modules, plain_copy
from lightning_plugins.selection import check_layers, is_called, select_kept, select_modules

M = TypeVar("M", bound=nn.Module)


def find_blocks(
    model: nn.Module, example_inputs: Any, blocks: str | Sequence[str], *, keep: str | Sequence[str] | None = None
) -> ChannelSearch:
    """Find the residual blocks that can be removed as a whole.

    A block is a module whose output, a tensor or a tuple that begins with one, has the shape of the first tensor that
    it is given. Whether the network runs without it, and computes what it computes with the block's input as output,
    is tried on a copy with random weights.

    Args:
        model: The model; it is not changed.
        example_inputs: What it takes: a tensor, a tuple of arguments or a dict of keyword arguments.
        blocks: A dotted name, a glob, or several. A glob stands for the outermost modules that it matches, and passes
            over those that are no blocks.
        keep: Layers that stay as they are, and so do the blocks around them.

    Returns:
        The blocks, as groups of one unit each, and for each module that a glob passed over the reason.

    Raises:
        ValueError: If a name is not that of such a block, or none is left.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> import torch
        >>> block = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> search = find_blocks(nn.Sequential(nn.Linear(4, 4), block), torch.zeros(1, 4), "*")
        >>> [group.block for group in search.groups], search.refused
        (['1'], {'0': 'it is a Linear, and not a block of several layers'})
    """
    exact, chosen = _candidates(model, blocks)
    refused, found = _forms(model, example_inputs, chosen, select_kept(model, keep))
    groups = [ChannelGroup(name, 1, (), block=name, returns=form) for name, form in found.items()]
    passed, failed = tried(plain_copy(model), groups, example_inputs)
    refused.update({group.name: reason for group, reason in failed})
    for name in exact:
        if name in refused:
            raise ValueError(f"`blocks`: {name!r} cannot be removed: {refused[name]}")
    if not passed:
        few = "; ".join(f"{name!r}: {reason}" for name, reason in list(refused.items())[:3])
        raise ValueError(f"`blocks`: {blocks!r} must match a residual block that can be removed, but {few}")
    return ChannelSearch(passed, refused)


def skip_blocks(model: M, blocks: str | Sequence[str], example_inputs: Any) -> M:
    """Remove residual blocks: a `Skipped`, which returns its input, takes the place of each.

    Args:
        model: The model, changed in place.
        blocks: A dotted name, a glob, or several, as ``"encoder.layer.3"``. A glob stands for the outermost modules
            that it matches, and passes over those that are no blocks.
        example_inputs: What the model takes, to see what the blocks return: a tensor, a tuple of arguments or a dict of
            keyword arguments.

    Returns:
        ``model``.

    Raises:
        ValueError: If a block is not there, its output has another shape than its input, later layers need more of it
            than this output, or one stands inside another.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
        >>> skip_blocks(net, "1", torch.zeros(1, 4))
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): Skipped()
        )
    """
    modules = clean_modules(model)
    found = find_blocks(model, example_inputs, blocks).groups
    skip_modules(model, {modules[group.block]: group.returns for group in found})
    return model


def _candidates(model: nn.Module, blocks: str | Sequence[str]) -> tuple[list[str], dict[str, nn.Module]]:
    """The names that are given in full, and all modules that may be blocks, outermost ones by name."""
    try:
        patterns = check_layers(blocks, sides=False)
        modules = {name: m for pattern in patterns for name, m in select_modules(model, pattern).items()}
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("`layers`", "`blocks`")) from None
    exact = [pattern for pattern in patterns if pattern in modules]
    for name in exact:
        if not is_called(modules[name]):
            raise ValueError(
                f"`blocks`: {name!r} is a {type(modules[name]).__name__}, which a forward pass does not call; name its "
                f"entries: '{name}.*' takes all of them"
            )
    modules = {name: module for name, module in modules.items() if is_called(module)}
    inside = {name: _around(name, modules) for name in modules}
    for name in exact:
        if inside[name]:
            raise ValueError(f"`blocks`: {name!r} lies inside of {inside[name]!r}; name one of the two")
    places = {name: place for place, name in enumerate(clean_modules(model))}
    outermost = sorted((name for name in modules if not inside[name]), key=places.__getitem__)
    return exact, {name: modules[name] for name in outermost}


def _around(name: str, modules: Mapping[str, nn.Module]) -> str:
    parts = name.split(".")
    above = [".".join(parts[:count]) for count in range(1, len(parts))]
    return next((other for other in above if other in modules), "")


def _forms(
    model: nn.Module, inputs: Any, chosen: Mapping[str, nn.Module], kept: set[str]
) -> tuple[dict[str, str], dict[str, int]]:
    """For modules that are no blocks the reason, and for the others the form of what they return."""
    refused: dict[str, str] = {}
    check_example("example_inputs", inputs)
    found: dict[str, int] = {}
    for name, module in chosen.items():
        inner = next((other for other in kept if other == name or other.startswith(f"{name}.")), None)
        if isinstance(module, Skipped):
            refused[name] = "it is skipped already"
        elif not any(module._modules.values()):
            refused[name] = f"it is a {type(module).__name__}, and not a block of several layers"
        elif inner is not None:
            refused[name] = f"`keep` names {inner!r}, so that it stays"

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if reason := _mismatch(first_tensor(args, kwargs), output):
                refused[name] = reason
            else:
                found[name] = len(output) if isinstance(output, tuple) else 0

        return hook

    open_ones = {name: module for name, module in chosen.items() if name not in refused}
    handles = [module.register_forward_hook(look(name), with_kwargs=True) for name, module in open_ones.items()]
    try:
        run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    for name in open_ones:
        if name not in refused and name not in found:
            refused[name] = "no forward pass of the example input calls it"
    return refused, {name: form for name, form in found.items() if name not in refused}


def _mismatch(given: Tensor | None, output: Any) -> str:
    """Return the reason why a module with such an input and output is no block; empty if it is one."""
    first = output[0] if isinstance(output, tuple) and output else output
    if given is None:
        return "it is given no tensor"
    if not isinstance(first, Tensor):
        return f"it returns a {type(output).__name__}, and neither a tensor nor a tuple that begins with one"
    if first.shape != given.shape:
        return f"it turns shape {tuple(given.shape)} into {tuple(first.shape)}, where a block returns that of its input"
    if first.dtype != given.dtype:
        return f"it turns {given.dtype} into {first.dtype}, where a block returns the type of its input"
    return ""
