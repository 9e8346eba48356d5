"""Channels of tensors that can only be removed together, read from Torch-Pruning's dependency graph."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from lightning_plugins.compression.channels.resize import heads_of, is_depthwise, projections_of
from lightning_plugins.compression.networks.tracing import trace

_NORMS_PER_CHANNEL = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_NORMS_OVER_CHANNELS = (nn.LayerNorm, nn.GroupNorm)
_BLOCKS = {"qkv": 3, "kv": 2, "qk": 2}


class Place(NamedTuple):
    """One channel of one side of a module, or of a parameter that stands alone.

    Attributes:
        owner: The name of the module or parameter; empty for an operation without parameters.
        side: ``"out"``, ``"in"``, ``"norm"`` or ``"parameter"``.
        channel: Its number.
    """

    owner: str
    side: str
    channel: int


class Bundle(NamedTuple):
    """Channels that only can be removed together.

    Attributes:
        places: Where they are.
        reason: Why they cannot be removed, or empty.
        attention: The attention of which they are a head, or empty.
    """

    places: tuple[Place, ...]
    reason: str
    attention: str


class _Sets:
    """Disjoint sets of elements, which are added as they are met."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.number: dict[Any, int] = {}

    def add(self, element: Any) -> int:
        number = self.number.setdefault(element, len(self.parent))
        if number == len(self.parent):
            self.parent.append(number)
        return number

    def find(self, number: int) -> int:
        while self.parent[number] != number:
            self.parent[number] = self.parent[self.parent[number]]
            number = self.parent[number]
        return number

    def join(self, one: Any, other: Any) -> None:
        first, second = sorted((self.find(self.add(one)), self.find(self.add(other))))
        self.parent[second] = first


def bundles(model: nn.Module, example_inputs: Any) -> list[Bundle]:
    """Trace a model, and find the channels that can only be removed together.

    Args:
        model: The model, in evaluation mode, with parameters that take gradients.
        example_inputs: A tensor, a tuple of arguments or a dict of keyword arguments.

    Returns:
        Bundles, in the order of the model's layers and their channels.
    """
    graph = trace(model, example_inputs)
    nodes = dict(enumerate(graph.module2node.values()))
    number = {id(node): i for i, node in nodes.items()}
    sets = _Sets()
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    names.update({id(parameter): name for name, parameter in model.named_parameters()})
    roots = [node for node in nodes.values() if isinstance(node.module, nn.modules.conv._ConvNd | nn.Linear)]
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    roots.sort(key=lambda node: order.get(names.get(id(node.module), ""), 0))
    largest = max((_limit(node.module, side) for node in roots for side in ("in", "out")), default=0)
    for node in roots:
        _walk(graph, node, number, sets, largest)
    for node in roots:
        _join_groups(node.module, number[id(node)], sets)
    heads = _join_heads(model, graph, number, sets)
    members: dict[int, list[tuple[int, str, int]]] = defaultdict(list)
    for element, index in sets.number.items():
        members[sets.find(index)].append(element)
    fixed = _of_norms_over_channels(model)
    found = [_bundle(elements, nodes, names, heads, largest, fixed) for elements in members.values()]
    return sorted(found, key=lambda bundle: _place_key(bundle, order))


def _of_norms_over_channels(model: nn.Module) -> set[int]:
    """Parameters of norms of other classes than torch's: what is not known to be per channel may be over channels."""
    # Trying does not always tell: what such a norm does to a channel may hardly reach the output of random weights.
    own = [m for m in model.modules() if "norm" in type(m).__name__.lower() and not isinstance(m, _NORMS_PER_CHANNEL)]
    return {id(parameter) for module in own for parameter in module._parameters.values() if parameter is not None}


def _place_key(bundle: Bundle, order: Mapping[str, int]) -> tuple[int, int]:
    keys = [(order[place.owner], place.channel) for place in bundle.places if place.side == "out"]
    return min(keys, default=(len(order), 0))


def _side(handler: Any) -> str:
    return "in" if handler.__name__ == "prune_in_channels" else "out"


def _walk(graph: Any, root: Any, number: Mapping[int, int], sets: _Sets, largest: int) -> None:
    """Join every channel of a layer's output with the channels that go with it.

    Channels behind the largest that any layer has come from a cycle of reshapes, which multiplies them without end.
    """
    from torch_pruning._helpers import _HybridIndex  # type: ignore[import-untyped]  # it ships no types

    pruner = graph.get_pruner_of_module(root.module)
    channels = range(pruner.get_out_channels(root.module))
    start = [i for i in channels if (number[id(root)], "out", i) not in sets.number]
    for i in start:
        sets.add((number[id(root)], "out", i))
    stack = [(root, pruner.prune_out_channels, start)]
    while stack:
        node, handler, indices = stack.pop()
        source = number[id(node)], _side(handler)
        for dependency in node.dependencies:
            if not dependency.is_triggered_by(handler):
                continue
            moved = [_HybridIndex(idx=i, root_idx=i) for i in indices]
            try:
                for mapping in dependency.index_mapping:
                    moved = moved if mapping is None else mapping(moved)
            except (
                ZeroDivisionError,
                IndexError,
            ):  # a reshape or split that it did not expect: none of these may leave
                moved = [_HybridIndex(idx=largest, root_idx=i) for i in indices]
            target = number[id(dependency.target)], _side(dependency.handler)
            new = []
            for item in moved:
                if item.idx < largest and (*target, item.idx) not in sets.number:
                    new.append(item.idx)
                if item.root_idx is not None:
                    sets.join((*source, item.root_idx), (*target, item.idx))
            if new:
                stack.append((dependency.target, dependency.handler, new))


def _join_groups(module: nn.Module, node: int, sets: _Sets) -> None:
    """Channels at the same position of every group of a grouped convolution: they leave together."""
    if not isinstance(module, nn.modules.conv._ConvNd) or module.groups == 1 or module.groups == module.out_channels:
        return
    for side, channels in (("out", module.out_channels), ("in", module.in_channels)):
        each = channels // module.groups
        present = [i for i in range(channels) if (node, side, i) in sets.number]
        for i in present:
            sets.join((node, side, i % each), (node, side, i))


def _join_heads(model: nn.Module, graph: Any, number: Mapping[int, int], sets: _Sets) -> dict[int, str]:
    """Join the channels of every head of an attention; returns which projection belongs to which attention."""
    owners = {}
    for name, module in model.named_modules():
        heads = heads_of(module)
        for part in projections_of(module) if heads else ():
            layer = module._modules[part]
            node = graph.module2node.get(layer)
            if heads is None or not isinstance(layer, nn.Linear) or node is None:
                continue
            blocks = _BLOCKS.get(part, 1)
            if layer.out_features % (blocks * heads):
                continue
            owners[number[id(node)]] = name
            width, size = layer.out_features // blocks, layer.out_features // blocks // heads
            for i in range(layer.out_features):
                key = number[id(node)], "out"
                sets.join((*key, i % width // size * size), (*key, i))
    return owners


def _bundle(
    elements: list[tuple[int, str, int]],
    nodes: dict[int, Any],
    names: dict[int, str],
    heads: Any,
    largest: int,
    fixed: set[int],
) -> Bundle:
    places, reason, attention = [], "", ""
    for node, side, index in sorted(elements):
        module = nodes[node].module
        attention = attention or (heads.get(node, "") if side == "out" else "")
        name = names.get(id(module), "")
        place = _kind(module, side)
        if type(module).__name__ == "_OutputOp":
            reason = reason or "it reaches the model's output"
        elif id(module) in fixed:
            reason = reason or f"it passes {name.rpartition('.')[0]!r}, whose statistics are taken over channels"
        elif place is None and name and not _within_heads(module, index):
            reason = reason or f"it passes {name!r}, {_why(module)}"
        elif place is not None:
            if index >= _limit(module, side):
                reason = reason or f"channel {index} of {name!r} does not exist: the tracer did not follow a reshape"
            places.append(Place(name, place, index))
        elif index >= largest:
            reason = reason or "the tracer did not follow a reshape behind it"
    return Bundle(tuple(places), reason, attention)


def _kind(module: Any, side: str) -> str | None:
    if isinstance(module, nn.modules.conv._ConvNd):
        return "out" if is_depthwise(module) else side
    if isinstance(module, nn.Linear):
        return side
    if isinstance(module, _NORMS_PER_CHANNEL):
        return "norm"
    if isinstance(module, nn.PReLU):
        return "norm" if module.num_parameters > 1 else None
    return "parameter" if isinstance(module, nn.Parameter) else None


def _within_heads(module: Any, index: int) -> bool:
    """Return whether a norm without this channel must be one over the size of a head, and ignores their number."""
    if isinstance(module, nn.PReLU):
        return module.num_parameters == 1
    return isinstance(module, nn.LayerNorm) and index >= module.normalized_shape[-1]


def _why(module: Any) -> str:
    if isinstance(module, _NORMS_OVER_CHANNELS):
        return "whose statistics are taken over channels"
    return f"a {type(module).__name__}, whose channels are not removed here"


def _limit(module: Any, side: str) -> int:
    if isinstance(module, nn.Linear):
        return module.out_features if side == "out" else module.in_features
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels if side == "out" else module.in_channels
    if isinstance(module, nn.Parameter):
        return max((size for size in module.shape if size > 1), default=1)
    return int(module.num_parameters if isinstance(module, nn.PReLU) else module.num_features)


def parameters_of(model: nn.Module, owner: str, side: str) -> Iterator[tuple[str, int, str]]:
    """The tensors that hold a side of a layer: their names, the dimension, and their role for the channel.

    Args:
        model: The model.
        owner: The layer's name, or that of a parameter.
        side: As in `Place`.

    Yields:
        Name, dimension, and ``"out"``, ``"norm"``, ``"in"`` or ``"buffer"``.
    """
    if side == "parameter":
        shape = model.get_parameter(owner).shape
        yield owner, [dim for dim, size in enumerate(shape) if size > 1][-1], "norm"
        return
    layer = model.get_submodule(owner)
    transposed = isinstance(layer, nn.modules.conv._ConvNd) and layer.transposed and not is_depthwise(layer)
    dim = int(transposed) if side == "out" else 1 - int(transposed) if side == "in" else 0
    for name, tensor in (*layer._parameters.items(), *layer._buffers.items()):
        if tensor is None or tensor.ndim == 0 or (side == "in" and name != "weight"):
            continue
        role = side if name in layer._parameters else "buffer"
        yield f"{owner}.{name}", dim if name == "weight" else 0, role
