"""Channels, blocks and layers of a network among which a budget chooses, and how those that leave are replaced."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_plugins.compression.budget.budget import Projection
from lightning_plugins.compression.budget.carried_state import chained, sliced_replacement, split_layers
from lightning_plugins.compression.budget.filling import ChoiceSettings
from lightning_plugins.compression.channels.blocks import find_blocks
from lightning_plugins.compression.channels.find import channel_groups, find_channel_groups, groups_from_state
from lightning_plugins.compression.channels.group import ChannelGroup, ChannelSearch
from lightning_plugins.compression.channels.shrink import shrink
from lightning_plugins.compression.costs.coverage import untouched
from lightning_plugins.compression.networks.replacements import Replacements
from lightning_plugins.selection import select_kept


def find_groups(
    model: nn.Module, settings: ChoiceSettings, inputs: Any, state: Iterable[dict[str, Any]] | None
) -> ChannelSearch:
    """Find the groups of channels, and after them the blocks.

    Args:
        model: The model, dense.
        settings: The layers and blocks to choose in.
        inputs: What the model takes.
        state: The state of the groups, where they are known.

    Returns:
        The groups, and for modules that match ``blocks`` and are none the reasons.

    Raises:
        ValueError: If there is nothing to choose in.
    """
    if state is not None:
        return ChannelSearch(groups_from_state(state), {})
    found: list[ChannelGroup] = []
    keep, blocks = settings.limits.keep or (), settings.blocks
    if settings.masks and settings.layers:  # blocks are enough to choose in
        find = channel_groups if blocks is None else _found_channels
        found = find(model, inputs, settings.layers, keep=keep)
    if blocks is None:
        return ChannelSearch(found, {})
    search = find_blocks(model, inputs, blocks, keep=settings.limits.keep)
    return ChannelSearch([*found, *search.groups], search.refused)


def _found_channels(*arguments: Any, **chosen: Any) -> list[ChannelGroup]:
    return find_channel_groups(*arguments, **chosen).groups


def out_of_reach(
    model: nn.Module, settings: ChoiceSettings, groups: Iterable[ChannelGroup], ranked: Iterable[str]
) -> str:
    """Say which weights stay whole although ``layers`` matches them.

    Args:
        model: The model, dense.
        settings: The layers to choose in.
        groups: Groups of channels and blocks.
        ranked: Layers that may become low-rank.

    Returns:
        A sentence; empty where they are few.
    """
    if not settings.layers:
        return ""
    touched = [member.parameter for group in groups for member in group.members] + list(ranked)
    blocks = tuple(f"{group.block}." for group in groups if group.block)
    touched += [name for name, _ in model.named_parameters() if name.startswith(blocks)]
    return untouched(model, settings.layers, touched, select_kept(model, settings.limits.keep))


def remove_chosen(model: nn.Module, groups: list[ChannelGroup], choice: Projection) -> Replacements:
    """Remove closed units and blocks, and singular values, from a baked model.

    Args:
        model: The model, changed in place.
        groups: Its groups of channels and blocks.
        choice: What stays.

    Returns:
        The replacements of each removed parameter; none for those of a block.
    """
    before = dict(model.named_parameters(remove_duplicate=False))
    cut: dict[nn.Parameter, Any] = {}
    slices = shrink(model, groups, choice.kept) if groups else {}
    for name, cuts in slices.items():
        if name in before:  # and is no buffer
            cut[before[name]] = [sliced_replacement(model.get_parameter(name), dict(cuts))]
    left = {id(parameter) for parameter in model.parameters()}
    gone = closed_blocks(groups, choice)
    for name, parameter in before.items():
        if name.startswith(gone) and id(parameter) not in left:
            cut.setdefault(parameter, [])
    ranks = {name: rank for name, rank in choice.ranks.items() if not name.startswith(gone)}
    return chained(cut, split_layers(model, ranks, scheme=1) if ranks else {})


def closed_blocks(groups: Iterable[ChannelGroup], choice: Projection) -> tuple[str, ...]:
    """The prefixes of the names of all that stands in blocks that do not stay.

    Args:
        groups: Groups of channels and blocks.
        choice: What stays.

    Returns:
        Names that end in a dot.
    """
    pairs = zip(groups, choice.kept, strict=True)
    return tuple(f"{group.block}." for group, keep in pairs if group.block and not keep.any())
