"""Try on a copy with random weights whether groups of channels can be removed, and what it takes to mask them."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.compression.channels.group import ChannelGroup
from lightning_plugins.compression.channels.shrink import shrink
from lightning_plugins.compression.costs.layer_costs import run
from lightning_plugins.compression.networks.tracing import tensors_in

_TOLERANCE = 1e-5  # of the largest output, in float64: room for models that compute some parts in float32
_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError, KeyError)


def tried(
    model: nn.Module, groups: Sequence[ChannelGroup], inputs: Any
) -> tuple[list[ChannelGroup], list[tuple[ChannelGroup, str]]]:
    """Which of the groups can be removed from the model exactly.

    Args:
        model: The model; a copy of it is used.
        groups: The groups.
        inputs: What the model takes.

    Returns:
        The groups that can, with `gate_inputs` set, and the others with reasons.
    """
    if not groups:
        return [], []
    randomized = _randomized(model)
    inputs = _double(inputs)
    reasons: dict[str, str] = {}

    def fails(chosen: Sequence[ChannelGroup]) -> str:
        return _difference(randomized, chosen, inputs)

    gated = _largest([group._replace(gate_inputs=True) for group in groups], fails, reasons)
    passed = {group.name: group for group in gated}
    refused = [(group, reasons[group.name]) for group in groups if group.name not in passed]
    free = _largest([group._replace(gate_inputs=False) for group in gated], fails, {})
    passed.update({group.name: group for group in free})
    return list(passed.values()), refused


def _largest(
    groups: Sequence[ChannelGroup], fails: Callable[[Sequence[ChannelGroup]], str], reasons: dict[str, str]
) -> list[ChannelGroup]:
    """As many of the groups as do not fail together, found by halving what does."""
    passed: list[ChannelGroup] = []
    stack = [list(groups)]
    while stack:
        part = stack.pop()
        reason = fails([*passed, *part])
        if not reason:
            passed.extend(part)
        elif len(part) == 1:
            reasons[part[0].name] = reason
        else:
            middle = len(part) // 2
            stack += [part[middle:], part[:middle]]
    order = {group.name: place for place, group in enumerate(groups)}
    return sorted(passed, key=lambda group: order[group.name])


def _difference(model: nn.Module, groups: Sequence[ChannelGroup], inputs: Any) -> str:
    """How the masked model differs from the smaller one; empty if it does not."""
    generator = torch.Generator().manual_seed(0)
    kept = []
    for group in groups:
        order = torch.randperm(group.size, generator=generator)
        kept.append(order >= max(1, group.size // 3))  # a third leaves
    masked, smaller = copy.deepcopy(model), copy.deepcopy(model)
    try:
        _zero(masked, groups, kept)
        expected = tensors_in(run(masked, inputs))
        shrink(smaller, groups, kept)
        got = tensors_in(run(smaller, inputs))
    except _ERRORS as error:
        return f"the smaller network does not run: {' '.join(str(error).split())[:120]}"
    if [leaf.shape for leaf in got] != [leaf.shape for leaf in expected]:
        return "the smaller network's outputs have another shape"
    for one, other in zip(expected, got, strict=True):
        if not torch.isfinite(one).all():
            return "its outputs are not finite with random weights"
        if (one - other).abs().max() > _TOLERANCE * one.abs().max():
            return "removing its channels is not the same as masking them: other operations go over channels"
    return ""


def _zero(model: nn.Module, groups: Sequence[ChannelGroup], kept: Sequence[Tensor]) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for group, keep in zip(groups, kept, strict=True):
            mask = torch.cat([keep, torch.ones(1, dtype=torch.bool)])
            for member in group.members:
                if member.side in {"out", "norm"} or (member.side == "in" and group.gate_inputs):
                    gone = (~mask[torch.tensor(member.units)]).nonzero()[:, 0]
                    tensors[member.parameter].index_fill_(member.dim, gone.to(tensors[member.parameter].device), 0)


def _randomized(model: nn.Module) -> nn.Module:
    """A copy in float64 in which every channel counts: also where the model's own weights begin as zeros."""
    model = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            draw = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            last = name.rpartition(".")[2]
            if isinstance(tensor, nn.Parameter) and tensor.ndim > 1:
                tensor.copy_((draw * 2 - 1) * (6 / max(1, tensor[0].numel())) ** 0.5)
            elif last in {"bias", "running_mean"}:
                tensor.copy_(draw - 0.5)
            elif isinstance(tensor, nn.Parameter) or last == "running_var":
                tensor.copy_(draw + 0.5)
    return model


def _double(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {key: _double(value) for key, value in inputs.items()}
    return tuple(_double(value) for value in inputs) if isinstance(inputs, tuple) else inputs
