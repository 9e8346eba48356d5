"""Take channels out of a network: smaller tensors in smaller layers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_plugins.compression.channels.group import ChannelGroup, check_groups
from lightning_plugins.compression.channels.resize import heads_of, resize_heads, resize_layer
from lightning_plugins.compression.channels.skipped import skip_modules
from lightning_plugins.compression.networks.arguments import check_tensors
from lightning_plugins.compression.networks.parametrizations import clean_modules

Slices = dict[str, list[tuple[int, Tensor]]]


def shrink(model: nn.Module, groups: Sequence[ChannelGroup], kept: Sequence[Tensor]) -> Slices:
    """Remove channels from all tensors that have them.

    The result computes the same as the model with these channels masked. Masks must be off by then (`bake_masks`).
    Parameters that change become new objects, contiguous in memory; all others stay the objects they are. A block that
    does not stay is replaced by a `Skipped`.

    Args:
        model: The model, changed in place.
        groups: The groups, as `channel_groups` found them in this model.
        kept: For every group a boolean tensor of shape ``(size,)``: which units stay; at least one in each group of
            channels.

    Returns:
        For every parameter and buffer that was cut its name and, by dimension, the indices that were kept. An
        optimizer's state is cut alike.

    Raises:
        ValueError: If ``kept`` does not fit the groups, or the groups do not fit the model.

    Example:
        >>> from lightning_plugins.compression import channel_groups
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> groups = channel_groups(net, torch.zeros(1, 3))
        >>> cut = shrink(net, groups, [torch.arange(8) < 5])
        >>> net[2], cut["2.weight"]
        (Linear(in_features=5, out_features=4, bias=True), [(1, tensor([0, 1, 2, 3, 4]))])
    """
    check_kept(groups, kept)
    modules = clean_modules(model)
    tensors = {
        f"{owner}.{name}".removeprefix("."): tensor
        for owner, module in modules.items()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }
    forms = {group.block: group.returns for group, keep in zip(groups, kept, strict=True) if not keep.any()}
    gone = tuple(f"{block}." for block in forms)
    stays: dict[tuple[str, int], Tensor] = {}
    for group, keep in zip(groups, kept, strict=True):
        mask = torch.cat([keep.cpu(), torch.ones(1, dtype=torch.bool)])  # the last, at -1: not of this group
        for member in group.members:
            if member.parameter.startswith(gone):
                continue
            tensor = tensors.get(member.parameter)
            if tensor is None or tensor.shape[member.dim] != len(member.units):
                found = "no such tensor" if tensor is None else f"shape {tuple(tensor.shape)}"
                raise ValueError(
                    f"`groups` must be those of this model as it is: {member.parameter!r} should have "
                    f"{len(member.units)} entries in dimension {member.dim}, got {found}"
                )
            part = mask[torch.tensor(member.units)]
            key = member.parameter, member.dim
            stays[key] = stays[key] & part if key in stays else part
    slices: Slices = {}
    for (name, dim), stay in stays.items():
        if not stay.all():
            slices.setdefault(name, []).append((dim, stay.nonzero()[:, 0]))
    _cut(modules, tensors, slices)
    for group, keep in zip(groups, kept, strict=True):
        if group.attention and not keep.all():
            for attention in {group.attention, *(layer.rpartition(".")[0] for layer in group.layers)}:
                if attention.startswith(gone):
                    continue
                if (heads := heads_of(modules[attention])) is not None:  # some read it off the shapes
                    resize_heads(modules[attention], heads * int(keep.sum()) // group.size)
    skip_modules(model, {modules[block]: form for block, form in forms.items()})
    return slices


def check_kept(groups: Sequence[ChannelGroup], kept: Sequence[Tensor]) -> None:
    """Raise an error for masks that do not match the groups.

    Args:
        groups: The groups.
        kept: A boolean tensor for each.

    Raises:
        ValueError: If their number or shapes differ, they are not boolean, or one keeps no channel.
    """
    check_groups(groups)
    check_tensors("kept", kept)
    if len(kept) != len(groups):
        raise ValueError(f"`kept` must have one mask for each of the {len(groups)} groups, got {len(kept)}")
    for group, keep in zip(groups, kept, strict=True):
        if keep.dtype != torch.bool or tuple(keep.shape) != (group.size,):
            raise ValueError(
                f"`kept` must hold a boolean tensor of shape ({group.size},) for {group.name!r}, got {keep.dtype} of "
                f"shape {tuple(keep.shape)}"
            )
        if not group.block and not keep.any():
            raise ValueError(f"`kept` must leave at least one unit of {group.name!r}, got none")


def _cut(modules: dict[str, nn.Module], tensors: dict[str, Tensor], slices: Slices) -> None:
    by_layer: dict[str, dict[str, Tensor]] = {}
    for name, cuts in slices.items():
        tensor = tensors[name].detach()
        for dim, index in cuts:
            tensor = tensor.index_select(dim, index.to(tensor.device))
        owner, _, attribute = name.rpartition(".")
        by_layer.setdefault(owner, {})[attribute] = tensor
    for owner, parts in by_layer.items():
        resize_layer(modules[owner], parts)
