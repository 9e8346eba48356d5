"""The heads of attentions, read from their projections: for those whose reshapes no graph of layers follows."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from lightning_plugins.compression.channels.group import ChannelGroup, Member
from lightning_plugins.compression.channels.resize import heads_of
from lightning_plugins.compression.low_rank.transposed import is_transposed

_NAMES = (  # of queries, keys, values and what reads the heads, in one module of transformers
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
    ("q", "k", "v", "o"),
)
_FUSED = ("c_attn", "c_proj")
_HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim")


class _Part(NamedTuple):
    """A projection of an attention.

    Attributes:
        name: Its dotted name.
        layer: The layer.
        blocks: How many projections of one width are stacked in it.
        reads: Whether it reads the heads instead of computing them.
    """

    name: str
    layer: nn.Module
    blocks: int = 1
    reads: bool = False


class _Attention(NamedTuple):
    """An attention.

    Attributes:
        name: Its dotted name.
        parts: Its projections.
        head: The size of a head.
        units: The number of its groups of heads that share a key and a value.
        bias: The name of an embedding with a column for each head, or empty.
    """

    name: str
    parts: tuple[_Part, ...]
    head: int
    units: int
    bias: str


def attention_groups(model: nn.Module) -> list[ChannelGroup]:
    """Find the attentions of a model whose projections have known names, and their heads.

    A unit is a head or, where several heads share a key and a value, all of these. Attentions that hand a bias for each
    head on to one another, such as those of T5, lose the same heads. Whether the heads can be removed is not tried.

    Args:
        model: The model.

    Returns:
        One group for each attention, or for several of them, in the order of the model.
    """
    bound: dict[str, list[_Attention]] = defaultdict(list)
    for name, module in model.named_modules():
        if (found := _read(name, module)) is not None:
            shares = "has_relative_attention_bias" in vars(module)
            bound[re.sub(r"\.\d+(?=\.|$)", ".*", name) if shares else name].append(found)
    return [_group(attentions) for attentions in bound.values() if len({one.units for one in attentions}) == 1]


def head_size(module: nn.Module) -> int:
    """The size of an attention's heads, if it has an attribute for it.

    Args:
        module: Any module.

    Returns:
        The size, or 0.
    """
    return next((vars(module)[key] for key in _HEAD_SIZES if isinstance(vars(module).get(key), int)), 0)


def outputs_of(layer: nn.Module) -> int:
    """The number of features a linear layer or transposed one computes.

    Args:
        layer: The layer.

    Returns:
        The number.
    """
    return int(layer.get_parameter("weight").shape[1 if is_transposed(layer) else 0])


def _read(name: str, module: nn.Module) -> _Attention | None:
    children = module._modules
    size = head_size(module)
    parts: tuple[_Part, ...] = ()
    for names in _NAMES:
        if all(isinstance(children.get(part), nn.Linear) for part in names):
            layers = [_Part(f"{name}.{part}".removeprefix("."), module.get_submodule(part)) for part in names]
            parts = (*layers[:3], layers[3]._replace(reads=True))
            break
    if all((layer := children.get(part)) is not None and is_transposed(layer) for part in _FUSED):
        inside, out = (_Part(f"{name}.{part}".removeprefix("."), module.get_submodule(part)) for part in _FUSED)
        parts = inside._replace(blocks=3), out._replace(reads=True)
    if not parts:
        return None
    keys = parts[1] if len(parts) > 2 else parts[0]
    width = outputs_of(keys.layer) // keys.blocks
    heads = heads_of(module)
    if not size and heads and width % heads == 0:
        size = width // heads
    if size < 1 or width % size:
        return None
    bias = children.get("relative_attention_bias")
    label = f"{name}.relative_attention_bias.weight" if isinstance(bias, nn.Embedding) else ""
    return _Attention(name, parts, size, width // size, label)


def _group(attentions: Sequence[_Attention]) -> ChannelGroup:
    members: list[Member] = []
    units = attentions[0].units
    for attention in attentions:
        for part in attention.parts:
            members += _members(part, attention)
        if attention.bias:
            members.append(Member(attention.bias, 1, "out", tuple(range(units))))
    first = members[0].parameter.rpartition(".")[0]
    return ChannelGroup(first, units, tuple(members), attentions[0].name)


def _members(part: _Part, attention: _Attention) -> list[Member]:
    weight = part.layer.get_parameter("weight")
    computed = 1 if is_transposed(part.layer) else 0
    dim = 1 - computed if part.reads else computed
    width = weight.shape[dim] // part.blocks
    shared = width // attention.head // attention.units  # heads that share a key and a value
    each = tuple(i % width // attention.head // shared for i in range(weight.shape[dim]))
    members = [Member(f"{part.name}.weight", dim, "in" if part.reads else "out", each)]
    if not part.reads and part.layer._parameters.get("bias") is not None:
        members.append(Member(f"{part.name}.bias", 0, "out", each))
    return members
