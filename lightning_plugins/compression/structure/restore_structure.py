"""The structure that a state dict was saved with, rebuilt from its keys and shapes alone."""

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_plugins._checks import nearest
from lightning_plugins.compression.channels.resize import heads_of, projections_of, resize_heads, resize_layer, why_not
from lightning_plugins.compression.channels.skipped import BUFFER, Skipped, skip_modules
from lightning_plugins.compression.low_rank.layers import empty_low_rank_layer
from lightning_plugins.compression.low_rank.splittable import Layer, is_low_rank_pair, reason_against, replace_modules
from lightning_plugins.compression.low_rank.transposed import as_linear, is_transposed
from lightning_plugins.compression.structure.state_keys import (
    Shape,
    align,
    half_of,
    is_known,
    named_modules,
    shapes_in,
    shapes_of,
)
from lightning_plugins.weights import Scheme

M = TypeVar("M", bound=nn.Module)


def restore_structure(model: M, state_dict: Mapping[str, Any], *, strict: bool = True) -> M:
    """Give a dense model the low-rank and pruned layers that a state dict was saved with, in place.

    Keys ``fc.0.weight`` and ``fc.1.weight``, where the model has ``fc.weight``, are a low-rank layer; the shapes of the
    kernels say of which scheme. A tensor that is smaller than the model's is that of a layer with fewer channels;
    depthwise groups, sizes of norms and the number of an attention's heads (whose size stays) follow from it. A key
    ``block.skipped`` is that of a block that was removed: a `Skipped` takes its place. No
    values are loaded: ``model.load_state_dict(state_dict)`` does that afterwards. New parameters take device, dtype
    and ``requires_grad`` of those they replace; shared modules and tied parameters stay so. A model that has the
    structure already is left as it is. If something cannot be explained nothing is changed.

    Args:
        model: The model as its constructor makes it. A module that holds the layers, not a layer itself.
        state_dict: A state dict, or a checkpoint that has one under ``"state_dict"``. All names of it, or all of the
            model's, may have a prefix that the other's lack (``"model."``, DDP's ``"module."``), and the segments that
            `torch.compile` puts in are passed over.
        strict: Whether a name of which the model knows nothing is an error. It is not where
            ``load_state_dict(..., strict=False)`` is to follow.

    Returns:
        ``model``.

    Raises:
        TypeError: If ``state_dict`` is not a mapping.
        ValueError: If a name or shape cannot be explained.

    Example:
        >>> from lightning_plugins.compression import factorize
        >>> small = factorize(nn.Sequential(nn.Linear(8, 6)), 2)
        >>> dense = nn.Sequential(nn.Linear(8, 6))
        >>> restore_structure(dense, small.state_dict()).load_state_dict(small.state_dict())
        <All keys matched successfully>
    """
    known = shapes_of(model)
    incoming = align(shapes_in(state_dict), known)
    dense = (f"{layer}.1.{tensor}" for layer, _, tensor in (key.rpartition(".") for key in incoming))
    if not any(is_known(key, known) for key in (*incoming, *dense)):  # a low-rank model has no dense layer's names
        there = f"tensors such as {next(iter(known))!r}" if known else "no tensors"
        raise ValueError(
            f"`state_dict` must be one of {type(model).__name__}, which has {there}, got none of them, but such "
            f"as {next(iter(incoming))!r}"
        )
    plan = _Plan(model, known, incoming, strict=strict)
    if plan.problems:
        few = "; ".join(plan.problems[:3])
        more = f"; and {len(plan.problems) - 3} more" if len(plan.problems) > 3 else ""
        raise ValueError(
            f"`state_dict` must have the structure of a compressed {type(model).__name__}, but {few}{more}"
        )
    plan.carry_out()
    return model


class _Plan:
    """Changes to make, all found before the first is made."""

    def __init__(
        self, model: nn.Module, known: Mapping[str, Shape], incoming: Mapping[str, Shape], *, strict: bool
    ) -> None:
        self.model, self.known, self.incoming = model, known, incoming
        self.problems: list[str] = []
        self.pairs: dict[nn.Module, nn.Sequential] = {}
        self.shapes: dict[nn.Module, dict[str, Shape]] = {}
        self.heads: dict[nn.Module, int] = {}
        self.skipped: dict[nn.Module, int] = {}
        halves = {half for module in model.modules() for half in _halves(module)}
        for name, module in named_modules(model):
            if self._is_pair(name):
                self._plan_pair(name, module)
            else:
                self._plan_shapes(name, module, may_grow=module in halves)
            self._plan_heads(name, module)
            self._plan_skipped(name, module)
        self._look_for_strangers(strict=strict)

    def _is_pair(self, name: str) -> bool:
        """Return whether the state has a layer as two, without the dense layer's weight."""
        halves = (f"{name}.0.weight", f"{name}.1.weight")
        return f"{name}.weight" in self.known and f"{name}.weight" not in self.incoming and halves[0] in self.incoming

    def _plan_pair(self, name: str, layer: nn.Module) -> None:
        if layer in self.pairs:
            return
        shapes = [self.incoming.get(f"{name}.{half}.weight") for half in (0, 1)]
        if reason := reason_against(layer):
            self.problems.append(f"{name!r} comes in two and {reason}")
            return
        first, second = shapes
        dense = tuple(as_linear(layer).weight.shape)
        scheme = None if first is None or second is None else _scheme(dense, first, second)
        if scheme is None or first is None or second is None:
            self.problems.append(
                f"{name!r} comes in two with weights {first} and {second}, which are no low-rank form of "
                f"{self.known[f'{name}.weight']}"
            )
            return
        bias = f"{name}.1.bias" in self.incoming
        pair = empty_low_rank_layer(cast("Layer", layer), first[0], scheme=scheme, bias=bias)
        for half, part in enumerate(pair):
            sizes = {key: self.incoming.get(f"{name}.{half}.{key}") for key in dict(part.named_parameters())}
            resize_layer(part, {key: _zeros(part, key, size) for key, size in sizes.items() if size is not None})
        self.pairs[layer] = pair

    def _plan_shapes(self, name: str, module: nn.Module, *, may_grow: bool) -> None:
        changed: dict[str, Shape] = {}
        for key in (*module._parameters, *module._buffers):
            full = f"{name}.{key}" if name else key
            old, new = self.known.get(full), self.incoming.get(full)
            if old is None or new is None or old == new:
                continue
            if not may_grow and len(old) == len(new) and any(n > o for n, o in zip(new, old, strict=True)):
                self.problems.append(f"{full!r} has shape {new}, which is larger than the model's {old}")
                return
            changed[key] = new
        if reason := why_not(module, changed):
            self.problems.append(f"{name!r} ({type(module).__name__}) comes with other shapes: {reason}")
        elif changed:
            self.shapes[module] = changed

    def _plan_heads(self, name: str, module: nn.Module) -> None:
        heads = heads_of(module)
        if heads is None:
            return
        for child in projections_of(module):
            wide = int(is_transposed(module._modules[child] or module))  # the dimension of its outputs
            old = _outputs(f"{name}.{child}", self.known, wide)
            new = _outputs(f"{name}.{child}", self.incoming, wide)
            if not old or not new or old == new:
                continue
            if (heads * new) % old:
                self.problems.append(
                    f"'{name}.{child}' has {new} outputs, which is not a whole number of heads: {heads} have {old}"
                )
            self.heads.setdefault(module, heads * new // old)

    def _plan_skipped(self, name: str, module: nn.Module) -> None:
        mark, key = self.incoming.get(f"{name}.{BUFFER}"), f"{name}.{BUFFER}"
        if mark is None or key in self.known:
            return
        others = [other for other in self.incoming if other.startswith(f"{name}.") and other != key]
        if others:
            self.problems.append(f"{name!r} is skipped there and has {others[0]!r} as well")
        elif len(mark) > 1 or not any(module._modules.values()):
            self.problems.append(f"{name!r} is skipped there, and in the model a {type(module).__name__}, not a block")
        self.skipped[module] = sum(mark)

    def _look_for_strangers(self, *, strict: bool) -> None:
        modules = dict(named_modules(self.model))
        skipped = [name for name, module in modules.items() if isinstance(module, Skipped)]
        for key in self.incoming:
            layer, _, _ = half_of(key)
            if key in self.known or (layer is not None and modules.get(layer) in self.pairs):
                continue
            holder, _, tensor = key.rpartition(".")
            below = modules.get(holder)
            if tensor == BUFFER and below in self.skipped:
                continue
            around = next((name for name in skipped if key.startswith(f"{name}.")), None)
            if around is not None:
                self.problems.append(f"{around!r} is there and skipped in the model; start from a fresh model")
                continue
            if tensor == "weight" and below is not None and _halves(below):
                self.problems.append(f"{holder!r} is dense there and low-rank in the model; start from a fresh model")
            elif strict:
                near = nearest(key, self.known, limit=1)
                hint = f" (nearest: {near[0]!r})" if near else ""
                self.problems.append(f"{key!r} is unknown to the model{hint}")

    def carry_out(self) -> None:
        holders: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in self.model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    holders.setdefault(parameter, []).append((module, key))
        for module, shapes in self.shapes.items():
            resize_layer(module, {key: _zeros(module, key, shape) for key, shape in shapes.items()})
        for tied in holders.values():
            for module, key in tied[1:]:
                module._parameters[key] = tied[0][0]._parameters[tied[0][1]]
        for module, heads in self.heads.items():
            resize_heads(module, heads)
        replace_modules(self.model, self.pairs)
        skip_modules(self.model, self.skipped)


def _scheme(dense: Shape, first: Shape, second: Shape) -> Scheme | None:
    """The scheme by which weights of two layers belong to a weight, whatever their channels."""
    if not len(dense) == len(first) == len(second) or first[0] != second[1]:
        return None
    if first[1] > dense[1] or second[0] > dense[0]:
        return None
    ones = tuple(1 for _ in dense[2:])
    if (first[2:], second[2:]) == (dense[2:], ones):  # of a kernel with one row both schemes are this
        return 1
    if len(dense) == 4 and (first[2:], second[2:]) == ((1, dense[3]), (dense[2], 1)):
        return 2
    return None


def _outputs(name: str, shapes: Mapping[str, Shape], dim: int) -> int:
    """The outputs of a layer, dense (in this dimension of its weight) or low-rank; 0 if it is not there."""
    places = ((f"{name}.weight", dim), (f"{name}.1.weight", 0))
    return next((shapes[key][of] for key, of in places if key in shapes), 0)


def _halves(module: nn.Module) -> tuple[nn.Module, ...]:
    """The two halves of a low-rank layer; nothing for another module."""
    if type(module) is nn.Sequential and len(module) == 2 and is_low_rank_pair(module[0], module[1]):
        return module[0], module[1]
    return ()


def _zeros(module: nn.Module, key: str, shape: Shape) -> Tensor:
    old: Tensor = getattr(module, key)
    return torch.zeros(shape, device=old.device, dtype=old.dtype)
