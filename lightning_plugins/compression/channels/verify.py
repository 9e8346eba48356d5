"""Verify on a copy with random weights that groups of channels can be removed, and how to mask them."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_plugins.compression.channels.group import ChannelGroup
from lightning_plugins.compression.channels.shrink import shrink
from lightning_plugins.compression.channels.skipped import first_tensor, with_first
from lightning_plugins.compression.costs.layer_costs import run
from lightning_plugins.compression.networks.tracing import tensors_in

_Groups = Sequence[ChannelGroup]
Run = Callable[[nn.Module, Any], Any]
_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError, KeyError)


class _Trial(NamedTuple):
    """A copy of a model with weights of some kind, its inputs, and the tolerance of equal outputs."""

    model: nn.Module
    inputs: Any
    tolerance: float  # of the largest output


def tried(
    model: nn.Module, groups: _Groups, inputs: Any, run: Run = run
) -> tuple[list[ChannelGroup], list[tuple[ChannelGroup, str]]]:
    """Return the groups that can be removed from the model exactly.

    The whole model is run first, in the types it can run in and with weights with which its outputs are finite. Each
    of the two searches behind it runs at most two networks per group.

    Args:
        model: The model; a copy of it is used.
        groups: The groups.
        inputs: What the model takes.
        run: Runs a model on inputs; its outputs are compared.

    Returns:
        The groups that can, with `gate_inputs` set, and the others with reasons.
    """
    if not groups:
        return [], []
    trial, reason = _first_trial(model, inputs, run)
    if trial is None:
        return [], [(group, reason) for group in groups]
    reasons: dict[str, str] = {}

    def fails(chosen: _Groups) -> str:
        # What a block returns besides is needed by the next one, if that is still there.
        rounds = 3 if sum(bool(group.block) for group in chosen) > 1 else 1
        return next(filter(None, (_difference(trial, chosen, run, number) for number in range(rounds))), "")

    gated = _largest([group._replace(gate_inputs=True) for group in groups], fails, reasons)
    passed = {group.name: group for group in gated}
    refused = [(group, reasons[group.name]) for group in groups if group.name not in passed]
    free = _largest([group._replace(gate_inputs=False) for group in gated], fails, {})
    passed.update({group.name: group for group in free})
    return list(passed.values()), refused


def _first_trial(model: nn.Module, inputs: Any, run: Run) -> tuple[_Trial | None, str]:
    """The first of several copies that runs and gives finite outputs, or else the reason why none does."""
    reason = ""
    for make in (_randomized, _jittered):  # random weights tell most, but not every network is finite at them
        for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-3), (None, 2e-2)):
            trial = _Trial(make(model, dtype), inputs if dtype is None else _cast(inputs, dtype), tolerance)
            found = _difference(trial, [], run)
            if not found:
                return trial, ""
            reason = reason or found
    return None, f"the network itself cannot be run: {reason}"


def _largest(
    groups: Sequence[ChannelGroup], fails: Callable[[Sequence[ChannelGroup]], str], reasons: dict[str, str]
) -> list[ChannelGroup]:
    """A large set of groups that pass together, found by bisecting sets that fail."""
    passed: list[ChannelGroup] = []
    stack = [list(groups)] if groups else []
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


def _difference(trial: _Trial, groups: _Groups, run: Run, number: int = 0) -> str:
    """Describe the difference between the masked model and the smaller one; empty if there is none."""
    generator = torch.Generator().manual_seed(0)
    kept = []
    for index, group in enumerate(groups):
        if group.block:  # all leave in the first round, every other one in the second and third
            kept.append(torch.tensor([number > 0 and index % 2 == number - 1]))
            continue
        order = torch.randperm(group.size, generator=generator)
        # A third leaves, or a half: sizes of two groups may have to agree.
        kept.append(order >= max(1, group.size // (3 - index % 2)))
    masked, smaller = copy.deepcopy(trial.model), copy.deepcopy(trial.model)
    at = _Last(masked)
    try:
        _zero(masked, groups, kept)
        expected = tensors_in(run(masked, copy.deepcopy(trial.inputs)))
        at = _Last(smaller)
        shrink(smaller, groups, kept)
        got = tensors_in(run(smaller, copy.deepcopy(trial.inputs)))
    except _ERRORS as error:
        whose = "the smaller network" if groups else "it"
        return f"{whose} does not run{at.where()}: {' '.join(str(error).split())[:120]}"
    if [leaf.shape for leaf in got] != [leaf.shape for leaf in expected]:
        return "the smaller network's outputs have another shape"
    for one, other in zip(expected, got, strict=True):
        if not torch.isfinite(one).all():
            return "its outputs are not finite with random weights"
        if one.numel() and (one - other).abs().max() > trial.tolerance * one.abs().max():
            return _what_differs(groups)
    return ""


def _what_differs(groups: _Groups) -> str:
    if not groups:
        return "its outputs differ from run to run"
    if groups[-1].block:
        return (
            "removing it is not the same as passing its input on: it changes its input in place, or later layers use "
            "what else it returns"
        )
    return "removing its channels is not the same as masking them: other operations act across channels"


class _Last:
    """The module of a copy that was called last, for the message of an error."""

    def __init__(self, model: nn.Module) -> None:
        self.name = ""
        for name, module in model.named_modules():
            if name:
                module.register_forward_pre_hook(self._note(name))

    def _note(self, name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            self.name = name

        return note

    def where(self) -> str:
        return f" at {self.name!r}" if self.name else ""


def _zero(model: nn.Module, groups: Sequence[ChannelGroup], kept: Sequence[Tensor]) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for group, keep in zip(groups, kept, strict=True):
            if group.block and not keep.any():
                model.get_submodule(group.block).register_forward_hook(_pass_on, with_kwargs=True)
            mask = torch.cat([keep, torch.ones(1, dtype=torch.bool)])
            for member in group.members:
                if member.side in {"out", "norm"} or (member.side == "in" and group.gate_inputs):
                    gone = (~mask[torch.tensor(member.units)]).nonzero()[:, 0]
                    tensors[member.parameter].index_fill_(member.dim, gone.to(tensors[member.parameter].device), 0)


def _pass_on(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    given = first_tensor(args, kwargs)
    return output if given is None else with_first(output, given)


def _copied(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy in evaluation mode, in one floating type, or each tensor in its own."""
    model = copy.deepcopy(model).eval()
    return model if dtype is None else model.to(dtype)


def _jittered(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy with a little noise on its parameters, so that equal ones differ."""
    model, generator = _copied(model, dtype), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel():
                draw = torch.rand(parameter.shape, generator=generator) - 0.5
                parameter.add_((draw * 0.2 * parameter.detach().float().abs().mean().clamp_min(1e-2)).to(parameter))
    return model


def _randomized(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy in which every channel counts: also where the model's own weights begin as zeros."""
    model = _copied(model, dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            draw = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            last = name.rpartition(".")[2]
            if isinstance(tensor, nn.Parameter) and tensor.ndim > 1:
                tensor.copy_((draw * 2 - 1) * (6 / max(1, tensor[0].numel())) ** 0.5)
            elif last in {"bias", "running_mean"}:
                tensor.copy_(draw - 0.5)
            elif isinstance(tensor, nn.Parameter) or last == "running_var":
                tensor.copy_(draw + 0.5)
    return model


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    """The inputs with all floating tensors converted to a dtype, in any container."""
    if isinstance(inputs, Tensor):
        return inputs.to(dtype) if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {key: _cast(value, dtype) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        parts = [_cast(value, dtype) for value in inputs]
        return type(inputs)(*parts) if hasattr(inputs, "_fields") else type(inputs)(parts)
    return inputs
