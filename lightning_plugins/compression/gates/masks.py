"""Masks on channels as parametrizations of weights: one vector of scores per group, learned with the rest."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_choice
from lightning_plugins.compression.channels.group import ChannelGroup, check_groups
from lightning_plugins.compression.channels.shrink import check_kept
from lightning_plugins.compression.gates.annealed import Annealed
from lightning_plugins.compression.gates.block_gate import BlockGate, BlockSlopes, put_on_gate, take_off_gates
from lightning_plugins.compression.gates.masked_weight import Masked, scale_at_once
from lightning_plugins.compression.gates.shared_masks import SharedMasks
from lightning_plugins.compression.networks.arguments import check_module, check_single
from lightning_plugins.compression.networks.parametrizations import clean_modules, put_on, take_off
from lightning_plugins.functional.masks import annealed_sigmoid, hard_concrete, straight_through

Gate = Literal["sigmoid", "straight_through", "hard_concrete"]
NAME = "channel_masks"


class ChannelMasks(Annealed):
    """The scores of all groups of channels of a model, and how they become masks. Made by `apply_masks`.

    Attributes:
        groups: The groups.
        scores: For each group a vector ``a`` of shape ``(size,)``. Units with a positive score stay.
        beta: The inverse temperature of the masks, a buffer.
        hard: Whether the masks are ``1[a > 0]``, a buffer.
        block_slopes: The derivatives of the loss with respect to the masks of blocks, since they were last taken.
    """

    hard: Tensor

    def __init__(self, groups: Sequence[ChannelGroup], *, beta: float, gate: Gate, init: float) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.kind = gate
        self.scores = nn.ParameterList(nn.Parameter(torch.full((group.size,), float(init))) for group in groups)
        self.register_buffer("beta", torch.tensor(float(beta)))
        self.register_buffer("hard", torch.tensor(False))
        self.is_hard = False  # the value of `hard`, read without waiting for the device
        self._noise: list[Tensor] | None = None
        self.shared = SharedMasks()
        self.block_slopes = BlockSlopes()

    def set_hard(self, hard: bool = True) -> None:
        """Choose between masks of zeros and ones and soft ones.

        Args:
            hard: Which.
        """
        self.hard.fill_(hard)
        self.is_hard = bool(hard)

    def set_kept(self, kept: Sequence[Tensor]) -> None:
        """Decide which units stay: scores on the wrong side of zero change their sign, and masks become hard.

        Args:
            kept: For every group a boolean tensor of shape ``(size,)``.

        Raises:
            ValueError: If ``kept`` does not fit the groups.
        """
        check_kept(self.groups, kept)
        with torch.no_grad():
            for scores, keep in zip(self.scores, kept, strict=True):
                size = scores.abs().clamp_min(torch.finfo(scores.dtype).eps)
                wrong = (scores > 0) != keep.to(scores.device)
                scores.copy_(torch.where(wrong, torch.where(keep.to(scores.device), size, -size), scores))
        self.set_hard()

    def kept(self) -> list[Tensor]:
        """Return the units with positive scores: a boolean tensor for each group."""
        return [scores.detach() > 0 for scores in self.scores]

    def values(self) -> list[Tensor]:
        """The masks of all groups, with gradients."""
        return [self.mask(index) for index in range(len(self.scores))]

    def mask(self, index: int) -> Tensor:
        """The mask of one group, with gradient unless it is hard.

        Args:
            index: The group's number.

        Returns:
            Tensor of shape ``(size,)`` in [0, 1].
        """
        scores: Tensor = self.scores[index]
        if self.is_hard:
            return (scores.detach() > 0).to(scores.dtype)
        noise = self._noise[index] if self._noise and self.training else None
        return self._soft(scores, noise)

    def flat(self) -> Tensor:
        """The masks of all groups in one vector, with gradient unless they are hard."""
        scores = torch.cat(list(self.scores))
        return (scores.detach() > 0).to(scores.dtype) if self.is_hard else self.gate()(scores)

    def gate(self) -> Callable[[Tensor], Tensor]:
        """Return the function from all scores, in one vector, to soft masks, with the noise that is drawn now."""
        noise = torch.cat(self._noise) if self._noise and self.training and not self.is_hard else None
        return partial(self._soft, noise=noise)

    def _soft(self, scores: Tensor, noise: Tensor | None) -> Tensor:
        if self.kind == "straight_through":
            return straight_through(scores, self.beta)
        if self.kind == "hard_concrete":
            return hard_concrete(scores, noise)
        return annealed_sigmoid(scores, self.beta)

    def draw(self, generator: torch.Generator | None = None) -> None:
        """Draw the noise of hard concrete masks; it stays for all forward passes until the next call.

        Args:
            generator: Random generator, on the CPU; by default torch's.
        """
        self._noise = [torch.rand(s.shape, generator=generator, dtype=s.dtype).to(s.device) for s in self.scores]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.is_hard = bool(self.hard)


def apply_masks(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    *,
    beta: float = 1.0,
    gate: Gate = "sigmoid",
    init: float = 1.0,
) -> ChannelMasks:
    """Multiply every channel of the groups by a mask, from now on.

    The weights that compute a channel are scaled, ``diag(m) W``, with its bias, and so are the scale and shift of its
    norm; where a channel of zeros is not zero for its readers, their weights are scaled too. The mask ``m`` of a block
    turns its output ``f(x)`` into ``x + m * (f(x) - x)``. The scores are registered
    once, as parameters of the submodule ``channel_masks`` of the model, whatever number of layers they act on; the
    weights themselves move to ``<layer>.parametrizations.weight.original``, the same parameter objects.

    Args:
        model: The model, changed in place.
        groups: The groups, as `channel_groups` found them in this model.
        beta: The inverse temperature to begin with.
        gate: ``"sigmoid"``: ``sigmoid(beta * a)``. ``"straight_through"``: zeros and ones with its gradient.
            ``"hard_concrete"``: see `lightning_plugins.functional.hard_concrete`; noise comes from `ChannelMasks.draw`.
        init: The scores to begin with.

    Returns:
        The masks.

    Raises:
        ValueError: If there is no group, the model has masks already, or a group does not fit the model.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> from lightning_plugins.compression import channel_groups
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> masks = apply_masks(net, channel_groups(net, torch.zeros(1, 3)))
        >>> [name for name, _ in net.named_parameters() if "masks" in name]
        ['channel_masks.scores.0']

    Source:
        Eo et al., https://arxiv.org/abs/2309.13077: our reading.
    """
    check_choice("gate", gate, get_args(Gate))
    if check_single("beta", beta) <= 0:
        raise ValueError(f"`beta` must be positive, got {beta!r}")
    check_single("init", init)
    check_groups(groups)
    if not groups:
        raise ValueError("`groups` must hold at least one group, got none")
    if masks_of(model) is not None:
        raise ValueError("`model` must have no masks yet; remove the old ones with `remove_masks`")
    modules = clean_modules(model)
    if "rank_thresholds" in model._modules:
        raise ValueError("`model` must get its masks before its thresholds: the thresholds act on masked weights")
    plan = list(_plan(groups))
    for name, dim, _, units in plan:
        _check_fits(modules, name, dim, len(units))
    for group in groups:
        if group.block and group.block not in modules:
            raise ValueError(f"`groups` must be those of this model: it has no block called {group.block!r}")
    masks = ChannelMasks(groups, beta=beta, gate=gate, init=init)
    reference = next(model.parameters())
    # Scores move by less than half precision tells apart.
    masks.to(device=reference.device, dtype=torch.float64 if reference.dtype == torch.float64 else torch.float32)
    by_parameter: dict[str, list[tuple[int, int, tuple[int, ...]]]] = {}
    for name, dim, index, units in plan:
        by_parameter.setdefault(name, []).append((dim, index, units))
    model.add_module(NAME, masks)
    for name, parts in by_parameter.items():
        owner, _, attribute = name.rpartition(".")
        masked = Masked(masks, parts, modules[owner], attribute).to(reference.device)
        put_on(modules[owner], attribute, masked)
        masks.shared.users.append(masked)
    for index, group in enumerate(groups):
        if group.block:
            put_on_gate(modules[group.block], BlockGate(masks, index))
    return masks


def masks_of(model: nn.Module) -> ChannelMasks | None:
    """The masks of a model.

    Args:
        model: The model.

    Returns:
        The masks that `apply_masks` put on, or None.

    Raises:
        TypeError: If ``model`` is not a module.

    Example:
        >>> masks_of(nn.Linear(3, 2)) is None
        True
    """
    check_module(model)
    masks = model._modules.get(NAME)
    return masks if isinstance(masks, ChannelMasks) else None


def remove_masks(model: nn.Module) -> None:
    """Remove the masks and restore the model, with the same parameters in the same order.

    Args:
        model: The model.

    Raises:
        ValueError: If it has no masks.

    Example:
        >>> from lightning_plugins.compression import channel_groups
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> masks = apply_masks(net, channel_groups(net, torch.zeros(1, 3)))
        >>> remove_masks(net)
        >>> masks_of(net) is None
        True
    """
    _take_off(model, bake=False)


def bake_masks(model: nn.Module) -> None:
    """Write hard masks into the weights and take the masks off: channels without a positive score become zeros.

    A block that does not stay cannot be written into weights: it acts again until `shrink` removes it.

    Args:
        model: The model. Its parameters stay the same objects.

    Raises:
        ValueError: If it has no masks.

    Example:
        >>> from lightning_plugins.compression import channel_groups
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> masks = apply_masks(net, channel_groups(net, torch.zeros(1, 3)))
        >>> masks.scores[0].data[:6] = -1.0
        >>> bake_masks(net)
        >>> net[0].weight.any(dim=1)
        tensor([False, False, False, False, False, False,  True,  True])
    """
    masks = masks_of(model)
    if masks is not None:
        masks.set_hard()
    _take_off(model, bake=True)


def _take_off(model: nn.Module, *, bake: bool) -> None:
    if masks_of(model) is None:
        raise ValueError("`model` must have masks to remove, got none; `apply_masks` adds them")
    scale_at_once(model)
    for module in list(model.modules()):
        take_off(module, Masked, bake=bake)
    take_off_gates(model)
    del model._modules[NAME]


def _plan(groups: Sequence[ChannelGroup]) -> Iterator[tuple[str, int, int, tuple[int, ...]]]:
    """Parameters to scale: name, dimension, number of the group, units."""
    for index, group in enumerate(groups):
        for member in group.members:
            if member.side in {"out", "norm"} or (member.side == "in" and group.gate_inputs):
                yield member.parameter, member.dim, index, member.units


def _check_fits(modules: dict[str, nn.Module], name: str, dim: int, size: int) -> None:
    owner, _, attribute = name.rpartition(".")
    tensor = getattr(modules.get(owner), attribute, None)
    if not isinstance(tensor, Tensor) or tensor.ndim <= dim or tensor.shape[dim] != size:
        found = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
        raise ValueError(
            f"`groups` must be those of this model: {name!r} needs {size} entries in dim {dim}, got {found}"
        )
