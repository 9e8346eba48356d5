"""The query and key maps of attention layers, found by the ways in which common libraries store them."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lightning_plugins.callbacks._terms.weight_gradients import scale_rows
from lightning_plugins.distributed import full_tensor
from lightning_plugins.selection import check_layers, select_modules

_PAIRS = (("query", "key"), ("q_proj", "k_proj"), ("q_lin", "k_lin"), ("to_q", "to_k"))
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")


class Map(NamedTuple):
    """Rows of a weight, and of its bias, that map to queries or keys.

    Attributes:
        module: The module that holds them.
        weight: The weight's name in it.
        bias: The bias' name in it.
        rows: The rows that are meant; None for all.
    """

    module: nn.Module
    weight: str
    bias: str
    rows: tuple[int, int] | None = None

    def heads(self, number: int) -> Tensor:
        """The map as ``(heads, h, d)``; assembled if it is sharded."""
        whole = full_tensor(getattr(self.module, self.weight).detach())
        part = whole if self.rows is None else whole[self.rows[0] : self.rows[1]]
        heads: Tensor = part.unflatten(0, (number, -1))
        return heads

    def scale(self, factors: Tensor) -> None:
        """Multiply the rows of each head by its factor, and its biases: the logits then shrink as a whole."""
        for name in (self.weight, self.bias):
            parameter = self.module._parameters.get(name)
            if parameter is not None:
                rows = len(parameter) if self.rows is None else self.rows[1] - self.rows[0]
                scale_rows(parameter, self.rows, factors.repeat_interleave(rows // len(factors)))


class QueryKey(NamedTuple):
    """The two maps of one attention layer."""

    label: str
    query: Map
    key: Map
    number: int  # of heads


def select_query_key(model: nn.Module, layers: str | Sequence[str]) -> list[QueryKey]:
    """Find the attention layers among those that ``layers`` names.

    These are ``nn.MultiheadAttention``, layers with a packed ``qkv`` linear layer as timm's, and layers with two linear
    layers for queries and keys as those of transformers, which say their number of heads.

    Args:
        model: The model.
        layers: A dotted name, a glob, or a sequence of them.

    Returns:
        The layers, in the model's order.

    Raises:
        ValueError: If a named layer is none of these, there is none at all, or keys have fewer heads than queries.
    """
    named, found = set(check_layers(layers, sides=False)), []
    for name, module in select_modules(model, layers).items():
        maps = _maps(name, module)
        if maps is not None:
            found.append(maps)
        elif name in named:
            raise ValueError(
                f"`layers`: {name!r} must be an attention layer with query and key maps and a number of heads, got "
                f"{type(module).__name__}; `of='weight'` caps weights one by one"
            )
    if not found:
        raise ValueError(
            f"`layers`: {layers!r} must match an attention layer with query and key maps, got none; `of='weight'` caps "
            "weights one by one"
        )
    return found


def _maps(name: str, module: nn.Module) -> QueryKey | None:
    number = next((value for value in (getattr(module, key, None) for key in _HEADS) if isinstance(value, int)), None)
    if isinstance(module, nn.MultiheadAttention):
        query, key = _of_torch(module)
        number = module.num_heads
    elif isinstance(packed := getattr(module, "qkv", None), nn.Linear):
        size = packed.out_features // 3
        query, key = (Map(packed, "weight", "bias", (i * size, (i + 1) * size)) for i in range(2))
    else:
        pairs = [[getattr(module, part, None) for part in pair] for pair in _PAIRS]
        pair = next((p for p in pairs if all(isinstance(part, nn.Linear) for part in p)), None)
        if pair is None:
            return None
        query, key = (Map(part, "weight", "bias") for part in pair if part is not None)
    if number is None:
        return None
    shapes = [tuple(getattr(part.module, part.weight).shape) for part in (query, key)]
    if query.rows is None and shapes[0] != shapes[1]:
        raise ValueError(
            f"`layers`: {name!r} must have queries and keys of one shape, got {shapes[0]} and {shapes[1]}; keys that "
            "several heads share are not supported"
        )
    return QueryKey(name, query, key, number)


def _of_torch(module: nn.MultiheadAttention) -> tuple[Map, Map]:
    size = module.embed_dim
    rows = [(i * size, (i + 1) * size) for i in range(2)]
    if module._qkv_same_embed_dim:
        return Map(module, "in_proj_weight", "in_proj_bias", rows[0]), Map(
            module, "in_proj_weight", "in_proj_bias", rows[1]
        )
    raise ValueError("`layers`: an `nn.MultiheadAttention` must have keys of the size of its queries, got `kdim`")
