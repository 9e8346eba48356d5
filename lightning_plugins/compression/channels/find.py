"""Channels that can only be removed together: through residual sums, concatenations, depthwise layers and heads."""

import copy
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_plugins._checks import check_instance, shown
from lightning_plugins.compression.channels.attention import attention_groups
from lightning_plugins.compression.channels.dependencies import Bundle, bundles, parameters_of
from lightning_plugins.compression.channels.group import ChannelGroup, ChannelSearch, Member, check_groups
from lightning_plugins.compression.channels.verify import tried
from lightning_plugins.compression.low_rank.splittable import replace_modules
from lightning_plugins.compression.low_rank.transposed import as_linear, is_transposed
from lightning_plugins.compression.networks.arguments import check_example, check_module
from lightning_plugins.compression.networks.parametrizations import plain_copy
from lightning_plugins.selection import check_layers, select_kept, select_modules

_PRODUCERS = (nn.Linear, nn.modules.conv._ConvNd)


def channel_groups(
    model: nn.Module, example_inputs: Any, layers: str | Sequence[str] = "*", *, keep: str | Sequence[str] = ()
) -> list[ChannelGroup]:
    """Find the channels of a model that can be removed, and which of them only together.

    The dependencies come from Torch-Pruning's graph of one forward pass. Whether they are right is tried on a copy of
    the model with random weights: what is left when channels are removed must compute what the whole computes when
    they are masked. Groups for which this does not hold are left out. So are the model's inputs and outputs, and
    channels over which a layer or group norm takes its statistics, such as the residual stream of a transformer. The
    heads of an attention are removed as a whole.

    Args:
        model: The model; it is not changed. Its channels are counted in the order of its layers, so that the same
            model gives the same groups.
        example_inputs: What the model takes: a tensor, a tuple of arguments or a dict of keyword arguments. One small
            sample is enough, and fastest.
        layers: The convolutions and linear layers whose outputs may lose channels: a dotted name, a glob, or a sequence
            of them. A group is taken if all layers that compute its channels are among them.
        keep: Layers whose outputs stay whole, in the same form.

    Returns:
        The groups, in the order of the layers.

    Raises:
        ValueError: If ``layers`` or ``keep`` match nothing, or no channel can be removed.
        TypeError: If an argument is of the wrong kind.
        ImportError: If torch-pruning is not installed.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> [group] = channel_groups(net, torch.zeros(1, 3, 8, 8))
        >>> group.name, group.size, [(member.parameter, member.dim) for member in group.members if member.dim == 1]
        ('0', 8, [('3.weight', 1)])

    Source:
        Fang et al., DepGraph, CVPR 2023, https://arxiv.org/abs/2301.12900, for the graph.
    """
    search = find_channel_groups(model, example_inputs, layers, keep=keep)
    if not search.groups:
        few = "; ".join(f"{name!r}: {reason}" for name, reason in list(search.refused.items())[:3]) or "none is called"
        raise ValueError(f"`layers`: {layers!r} must match a layer that can lose channels, but {few}")
    return search.groups


def find_channel_groups(
    model: nn.Module, example_inputs: Any, layers: str | Sequence[str] = "*", *, keep: str | Sequence[str] = ()
) -> ChannelSearch:
    """As `channel_groups`, with the reasons why the other layers stay whole, and no error where all of them do.

    Args:
        model: The model.
        example_inputs: What it takes.
        layers: The layers that may lose channels.
        keep: The layers that stay whole.

    Returns:
        The groups and the reasons.

    Raises:
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> import torch
        >>> search = find_channel_groups(net, torch.zeros(1, 3))
        >>> [group.name for group in search.groups], list(search.refused)
        (['0'], ['2'])
    """
    check_layers(layers, sides=False)
    check_module(model)
    check_example("example_inputs", example_inputs)
    kinds = (*_PRODUCERS, *{type(module) for module in model.modules() if is_transposed(module)})
    chosen = set(select_modules(model, layers, types=kinds))
    chosen -= select_kept(model, keep, types=kinds)
    plain = plain_copy(model)
    traced, turned = _traceable(plain)
    shared = _shared(plain)
    candidates: list[ChannelGroup] = []
    refused: dict[str, str] = {}
    for group, reason in _traced_groups(plain, traced, example_inputs, turned):
        reason = reason or _why_not(group, chosen, shared)
        if reason:
            refused.update(dict.fromkeys(group.layers, reason))
        else:
            candidates.append(group)
    for group in attention_groups(plain):
        if reason := _why_not(group, chosen | _biases(plain), shared):
            refused.update(dict.fromkeys(group.layers, reason))
            continue
        candidates = [other for other in candidates if not {*other.layers} & {*group.layers}]
        refused = {name: reason for name, reason in refused.items() if name not in group.layers}
        candidates.append(group)
    places = {name: place for place, (name, _) in enumerate(plain.named_modules())}
    candidates.sort(key=lambda group: min(places.get(layer, len(places)) for layer in group.layers))
    passed, failed = tried(plain, candidates, example_inputs)
    for group, reason in failed:
        refused.update(dict.fromkeys(group.layers, reason))
    names = dict(plain.named_modules())
    ordered = sorted(refused.items(), key=lambda item: list(names).index(item[0]) if item[0] in names else 0)
    return ChannelSearch(passed, dict(ordered))


def _traced_groups(
    plain: nn.Module, traced: nn.Module, example_inputs: Any, turned: Any
) -> Iterator[tuple[ChannelGroup, str]]:
    """Groups that the trace of a model gives, under names of their own, with the reason against each or nothing."""
    computed = {name for name, module in plain.named_modules() if _is_computed(module)}
    named = Counter[str]()
    for family in _families(bundles(traced, example_inputs)):
        group = _group(traced, family, turned)
        if group is None:
            continue
        named[group.name] += 1
        if named[group.name] > 1:
            group = group._replace(name=f"{group.name}~{named[group.name]}")
        inside = [place.owner for place in family[0].places if place.owner in computed]
        yield (
            group,
            family[0].reason or (f"the weight of {inside[0]!r} is computed from other parameters" if inside else ""),
        )


def groups_to_state(groups: Sequence[ChannelGroup]) -> list[dict[str, Any]]:
    """Groups as primitives, for a checkpoint that loads with ``weights_only=True``.

    Args:
        groups: The groups.

    Returns:
        One dict per group.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> import torch
        >>> (state,) = groups_to_state(groups := channel_groups(net, torch.zeros(1, 3)))
        >>> state["name"], state["size"], groups_from_state([state]) == groups
        ('0', 8, True)
    """
    check_groups(groups)
    return [{**group._asdict(), "members": [member._asdict() for member in group.members]} for group in groups]


def groups_from_state(state: Iterable[dict[str, Any]]) -> list[ChannelGroup]:
    """The inverse of `groups_to_state`.

    Args:
        state: One dict per group.

    Returns:
        The groups.

    Raises:
        TypeError: If it is not of that form.

    Example:
        >>> member = {"parameter": "0.weight", "dim": 0, "side": "out", "units": [0, 1]}
        >>> groups_from_state([{"name": "0", "size": 2, "members": [member]}])[0].layers
        ('0',)
    """
    rule = "a list of dicts, as `groups_to_state` gives"
    groups = []
    for entry in check_instance("state", state, (list, tuple), rule):
        try:
            members = tuple(Member(**{**member, "units": tuple(member["units"])}) for member in entry["members"])
            groups.append(ChannelGroup(**{**entry, "members": members}))
        except (KeyError, TypeError, IndexError) as error:
            raise TypeError(f"`state` must be {rule}, got {shown(entry)} in it") from error
    return groups


def _families(found: Iterable[Bundle]) -> list[list[Bundle]]:
    """Bundles that run through the same sides of the same layers."""
    families: dict[Any, list[Bundle]] = defaultdict(list)
    for bundle in found:
        counts: dict[tuple[str, str], int] = defaultdict(int)
        for place in bundle.places:
            counts[place.owner, place.side] += 1
        families[frozenset(counts.items()), bundle.reason, bundle.attention].append(bundle)
    return list(families.values())


def _traceable(model: nn.Module) -> tuple[nn.Module, set[str]]:
    """A copy for the tracer, with linear layers in the place of transposed ones, and the names of these."""
    traced = copy.deepcopy(model)
    turned = {name for name, module in traced.named_modules() if is_transposed(module)}
    replace_modules(traced, {traced.get_submodule(name): as_linear(traced.get_submodule(name)) for name in turned})
    for module in traced.modules():
        config: Any = getattr(module, "config", None)  # of transformers: a cache is a concatenation with nothing
        if hasattr(config, "use_cache"):
            config.use_cache = False
    return traced.eval().requires_grad_(True), turned


def _biases(model: nn.Module) -> set[str]:
    """Embeddings that are no layers to choose, but lose a column with a head."""
    return {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


def _group(model: nn.Module, family: Sequence[Bundle], turned: set[str]) -> ChannelGroup | None:
    sides: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    for unit, bundle in enumerate(family):
        for place in bundle.places:
            sides[place.owner, place.side][place.channel] = unit
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    members = []
    for (owner, side), units in sides.items():
        for name, dim, role in parameters_of(model, owner, side):
            stored = 1 - dim if owner in turned and name.endswith("weight") else dim
            size = tensors[name].shape[dim]  # for grouped inputs one group: the others are equal
            members.append(Member(name, stored, role, tuple(units.get(index, -1) for index in range(size))))
    members.sort(key=_order(model))
    first = next((member for member in members if member.side == "out"), None)
    if first is None:
        return None
    return ChannelGroup(first.parameter.rpartition(".")[0], len(family), tuple(members), family[0].attention)


def _order(model: nn.Module) -> Any:
    places = {name: place for place, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    return lambda member: (places.get(member.parameter, len(places)), member.dim)


def _shared(model: nn.Module) -> set[str]:
    """Names of parameters used at several places, where no slice fits all of them."""
    places: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places[id(parameter)].append(name)
    return {name for names in places.values() if len(names) > 1 for name in names}


def _is_computed(module: nn.Module) -> bool:
    """Return whether a weight is computed: by a parametrization, weight or spectral norm, or torch's pruning."""
    return is_parametrized(module) or (isinstance(module, _PRODUCERS) and "weight" not in module._parameters)


def _why_not(group: ChannelGroup, chosen: set[str], shared: set[str]) -> str:
    outside = [name for name in group.layers if name not in chosen]
    if outside:
        if len(group.layers) == 1:
            return "it is excluded by `layers` or `keep`"
        return f"its channels are also those of {outside[0]!r}, which is kept whole"
    tied = [member.parameter for member in group.members if member.parameter in shared]
    if tied:
        return f"{tied[0]!r} is a parameter of several layers"
    return "it has a single unit" if group.size < 2 else ""
