"""The cost of a network as a polynomial in the numbers of its channels."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_plugins.compression.channels.group import ChannelGroup
from lightning_plugins.compression.channels.shrink import shrink
from lightning_plugins.compression.costs.layer_costs import run
from lightning_plugins.compression.low_rank.transposed import is_transposed
from lightning_plugins.compression.networks.parametrizations import clean_modules, clean_name, plain_copy

_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)
_OURS = ("channel_masks", "rank_thresholds")


class Terms(NamedTuple):
    """``sum(factor * rows[first] * rows[second] * inner * units[block])``, where ``rows = least + counts @ units``.

    Attributes:
        counts: Number of occurrences of every unit in every row, ``(rows, units)``.
        least: The part of a row that belongs to no unit, ``(rows,)``.
        first: The row of a term's first dimension, ``(terms,)``.
        second: The row of its second dimension.
        inner: The product of its other dimensions.
        factor: What an entry costs.
        layer: For every term the number of the layer with a rank whose weight it is, or -1.
        per_unit: What a unit costs beyond that, ``(units,)``: the products of an attention's heads, and those with a
            matrix that no layer holds. Of a block all that is in it and that no channel changes.
        block: For every term the unit that is the block in which the layer stands, or the number of units for none.
        block_of_unit: For every unit the block in which all of its layers stand, likewise.
    """

    counts: Tensor
    least: Tensor
    first: Tensor
    second: Tensor
    inner: Tensor
    factor: Tensor
    layer: Tensor
    per_unit: Tensor
    block: Tensor
    block_of_unit: Tensor


def parameters_by_name(model: nn.Module) -> dict[str, Tensor]:
    """The model's own parameters by the names they have without masks and thresholds; a shared one appears once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for owner, module in clean_modules(model).items():
        segments = owner.split(".")
        if segments[0] in _OURS:
            continue
        name = owner
        if "parametrizations" in segments and "original" in module._parameters:
            name = ".".join(segment for segment in segments if segment != "parametrizations")
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                renamed = name != owner and key == "original"
                found[name if renamed else f"{owner}.{key}" if owner else key] = parameter
    return found


def count_terms(
    model: nn.Module, groups: Sequence[ChannelGroup], ranks: Sequence[str], inputs: Any, *, flops: bool
) -> tuple[Terms, int]:
    """The terms of a network's cost.

    Args:
        model: The network.
        groups: Its groups of channels.
        ranks: The names of layers whose weights may become low-rank.
        inputs: What the network takes, for operations.
        flops: Whether operations are counted, and not parameters.

    Returns:
        The terms, and the cost that no channel changes.
    """
    parameters = parameters_by_name(model)
    factors, own, constant = _flops(model, groups, parameters, inputs) if flops else (_ones(parameters), {}, 0)
    rows, blocks = _Rows(groups), _Blocks(model, groups)
    numbers = {f"{name}.weight": place for place, name in enumerate(ranks)}
    entries = []
    for name, parameter in parameters.items():
        shape = list(parameter.shape)
        if not factors.get(name):
            continue
        dims = rows.two_dims(name, len(shape))
        inner = math.prod(size for dim, size in enumerate(shape) if dim not in dims)
        places = [rows.place(name, dim, shape[dim]) for dim in dims] + [rows.place("", 0, 1)] * (2 - len(dims))
        entries.append((*places, inner, factors[name], numbers.get(name, -1), blocks.of(name)))
    first, second, inner_sizes, factor, layer, block = torch.tensor(entries, dtype=torch.int64).reshape(-1, 6).unbind(1)
    per_unit = torch.zeros(rows.units, dtype=torch.int64)
    for index, amount in own.items():
        per_unit[rows.offsets[index] : rows.offsets[index + 1]] = amount
    counts, least = rows.tensors()
    terms = Terms(counts, least, first, second, inner_sizes, factor, layer, per_unit, block, blocks.of_units())
    return terms, constant


def beyond_layers(model: nn.Module, groups: Sequence[ChannelGroup], inputs: Any) -> dict[int, int]:
    """Return the cost saved when a unit that also indexes a standalone parameter is removed.

    A matrix that is a parameter of no layer may be multiplied with; the FLOPs of layers do not show that.

    Args:
        model: The network.
        groups: Its groups of channels.
        inputs: What it takes.

    Returns:
        FLOPs of the network less those without the first unit, by the indices of such groups.
    """
    layers = {
        name for name, module in clean_modules(model).items() if isinstance(module, _WEIGHTED) or is_transposed(module)
    }
    parameters = parameters_by_name(model)
    found = {}
    for index, group in enumerate(groups):
        lone = [m for m in group.members if m.parameter.rpartition(".")[0] not in layers and m.parameter in parameters]
        if group.size > 1 and any(parameters[member.parameter].ndim > 1 for member in lone):
            kept = [torch.arange(one.size) > (0 if place == index else -1) for place, one in enumerate(groups)]
            whole, smaller = plain_copy(model), plain_copy(model)
            shrink(smaller, groups, kept)
            found[index] = _total(whole, inputs) - _total(smaller, inputs)
    return found


def _total(model: nn.Module, inputs: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run(model, inputs)
    return int(counter.get_total_flops())


class _Rows:
    """The different sizes that occur in a network, as sums over units of groups."""

    def __init__(self, groups: Sequence[ChannelGroup]) -> None:
        self.offsets = [0, *accumulate(group.size for group in groups)]
        self.units = self.offsets[-1]
        self.members: dict[tuple[str, int], list[tuple[int, tuple[int, ...]]]] = {}
        for offset, group in zip(self.offsets, groups, strict=False):
            for member in group.members:
                self.members.setdefault((member.parameter, member.dim), []).append((offset, member.units))
        self.places: dict[Any, int] = {}
        self.found: list[Counter[int]] = []
        self.least: list[int] = []

    def two_dims(self, name: str, ndim: int) -> list[int]:
        """The dimensions of a parameter that change, and others so that there are two, in their order."""
        moving = [dim for dim in range(ndim) if (name, dim) in self.members]
        return sorted([*moving, *[dim for dim in range(ndim) if dim not in moving]][:2])

    def place(self, name: str, dim: int, size: int) -> int:
        """The number of the row of a dimension."""
        parts = self.members.get((name, dim), [])
        key = tuple(parts) or size
        if key not in self.places:
            self.places[key] = len(self.places)
            self.found.append(Counter(offset + unit for offset, units in parts for unit in units if unit >= 0))
            self.least.append(size - self.found[-1].total())
        return self.places[key]

    def tensors(self) -> tuple[Tensor, Tensor]:
        """`Terms.counts` and `Terms.least`."""
        counts = torch.zeros(len(self.found), self.units, dtype=torch.float64)
        for row, found in enumerate(self.found):
            for unit, times in found.items():
                counts[row, unit] = times
        return counts, torch.tensor(self.least, dtype=torch.int64)


class _Blocks:
    """The blocks that may be removed, and the parameters and groups of channels that leave with each."""

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        self.groups, self.offsets = groups, [0, *accumulate(group.size for group in groups)]
        self.none = self.offsets[-1]
        self.units = {group.block: offset for group, offset in zip(groups, self.offsets, strict=False) if group.block}
        holders: dict[int, set[int]] = {}
        for owner, module in clean_modules(model).items() if self.units else ():
            for parameter in module._parameters.values():
                holders.setdefault(id(parameter), set()).add(self._around(owner))
        # A parameter that is used elsewhere as well stays.
        self.shared = {key for key, found in holders.items() if len(found) > 1}
        self.parameters = parameters_by_name(model)

    def of(self, parameter: str) -> int:
        """The unit of the block that a parameter leaves with."""
        return self.none if id(self.parameters[parameter]) in self.shared else self._around(parameter)

    def of_units(self) -> Tensor:
        """`Terms.block_of_unit`."""
        found = torch.full((self.none,), self.none)
        for offset, group in zip(self.offsets, self.groups, strict=False):
            around = {self._around(member.parameter) for member in group.members}
            if len(around) == 1:
                found[offset : offset + group.size] = around.pop()
        return found

    def _around(self, name: str) -> int:
        return next((unit for block, unit in self.units.items() if f"{name}.".startswith(f"{block}.")), self.none)


def _ones(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    return dict.fromkeys(parameters, 1)


def _flops(
    model: nn.Module, groups: Sequence[ChannelGroup], parameters: Mapping[str, Tensor], inputs: Any
) -> tuple[dict[str, int], dict[int, int], int]:
    """Return the FLOPs of an entry of every weight, of a unit of a group of heads beyond that, and of the rest."""
    with FlopCounterMode(display=False) as counter:
        run(model, inputs)
    total = counter.get_total_flops()
    root = type(model).__name__
    by_module = {clean_name(name): sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    modules = clean_modules(model)
    of_layers: dict[str, int] = {}
    for name, module in modules.items():
        weight = parameters.get(f"{name}.weight")
        if (isinstance(module, _WEIGHTED) or is_transposed(module)) and weight is not None and weight.numel():
            flops = by_module.get(f"{root}.{name}", 0)
            if flops % weight.numel() == 0:  # else it computes more than its product: that is constant
                of_layers[name] = flops
    own: dict[int, int] = {}
    rest = total - sum(of_layers.values())
    for index, group in enumerate(groups):
        if group.attention or group.block:
            place = group.attention or group.block
            inside = sum(flops for name, flops in of_layers.items() if name.startswith(f"{place}."))
            heads = [i for i in own if group.block and groups[i].attention.startswith(f"{place}.")]
            beyond = by_module.get(f"{root}.{place}", 0) - inside - sum(own[i] * groups[i].size for i in heads)
            own[index] = beyond // group.size
            rest -= own[index] * group.size
    factors = {f"{name}.weight": flops // parameters[f"{name}.weight"].numel() for name, flops in of_layers.items()}
    return factors, own, rest
