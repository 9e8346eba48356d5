"""Settings and candidates of a choice under a budget, and the best of them that fit."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins._checks import (
    check_choice,
    check_finite_number,
    check_instance,
    check_positive_int,
    check_positive_number,
    plain_number,
)
from lightning_plugins.compression.budget.budget import Budget
from lightning_plugins.compression.channels.blocks import find_blocks
from lightning_plugins.compression.channels.find import channel_groups, find_channel_groups, groups_from_state
from lightning_plugins.compression.channels.group import ChannelGroup, ChannelSearch
from lightning_plugins.compression.costs.coverage import untouched
from lightning_plugins.compression.costs.layer_costs import COSTS, Cost, run
from lightning_plugins.compression.low_rank.splittable import select_layers
from lightning_plugins.compression.networks.parametrizations import clean_modules
from lightning_plugins.selection import check_layers, select_kept


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a choice of channels and ranks: which layers stay, and which sizes are possible.

    Attributes:
        keep: Layers that stay as they are: a name, a glob, several of them, or None.
        min_size: Minimum number of channels of a group, and minimum rank of a layer, at least 1.
        multiple_of: Numbers of channels and ranks are multiples of this, at least 1, for speed; heads are not rounded.

    Raises:
        ValueError: If a field is out of its range.
        TypeError: If a field is of the wrong type.

    Example:
        >>> Limits(keep="head", multiple_of=8)
        Limits(keep='head', min_size=1, multiple_of=8)
    """

    keep: str | Sequence[str] | None = None
    min_size: int = 1
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if self.keep is not None:
            try:
                check_layers(self.keep, sides=False)
            except (TypeError, ValueError) as error:
                raise type(error)(str(error).replace("`layers`", "`keep`")) from None
        for name in ("min_size", "multiple_of"):
            object.__setattr__(self, name, check_positive_int(name, getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class ChoiceRates:
    """Step sizes of scores and thresholds, and how often a choice is renewed.

    Attributes:
        scores: Step size of the mask scores, above 0, divided by the inverse temperature, so that a mask's logit moves
            by this much in a typical step.
        thresholds: Step size of the thresholds, above 0; they are shares of a layer's largest singular value.
        beta_max: The inverse temperature at the end of the choice, at least 1, where it begins.
        refresh_every: Steps between two decompositions of the weights whose ranks are chosen. 1 gives the exact
            gradient in every step, 4 on average, at half of the cost.
        update_every: Steps between two choices of channels by the magnitude of their weights.

    Raises:
        ValueError: If a field is out of its range.
        TypeError: If a field is of the wrong type.

    Example:
        >>> ChoiceRates(scores=0.1, beta_max=50).beta_max
        50
    """

    scores: float = 0.05
    thresholds: float = 0.001
    beta_max: float = 100.0
    refresh_every: int = 1
    update_every: int = 10

    def __post_init__(self) -> None:
        for name in ("scores", "thresholds"):
            check_positive_number(name, getattr(self, name))
        if check_finite_number("beta_max", self.beta_max) < 1:
            raise ValueError(
                f"`beta_max` must be at least 1, where the inverse temperature begins, got {self.beta_max!r}"
            )
        for name in ("refresh_every", "update_every"):
            check_positive_int(name, getattr(self, name))
        for name in vars(self):
            object.__setattr__(self, name, plain_number(getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class ChoiceSettings:
    """The layers to choose in, and what may be left of a network.

    Attributes:
        layers: The layers to choose in: a name, a glob, or several; with ``blocks`` also an empty list.
        budget: The share of the network's cost that may be left.
        cost: ``"params"`` or ``"flops"``.
        masks: Whether channels are chosen.
        ranks: Whether ranks are.
        limits: Layers that stay as they are, and possible sizes.
        rates: Step sizes of scores and thresholds.
        blocks: The residual blocks that may be removed as a whole, in the form of ``layers``; None for none.

    Raises:
        ValueError: If one is out of its range.
        TypeError: If one is of the wrong type.
    """

    layers: str | Sequence[str] = "*"
    budget: float
    cost: Cost = "params"
    masks: bool = False
    ranks: bool = False
    limits: Limits = Limits()
    rates: ChoiceRates = ChoiceRates()
    blocks: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.blocks is None or self.layers != []:
            check_layers(self.layers, sides=False)
        try:
            check_layers("*" if self.blocks is None else self.blocks, sides=False)
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("`layers`", "`blocks`")) from None
        if not 0 < check_finite_number("budget", self.budget) < 1:
            hint = f"; did you mean {self.budget / 100!r}?" if 2 <= self.budget <= 100 else ""
            raise ValueError(
                "`budget`, the fraction of the cost that is left, must be more than 0 and less than 1, got "
                f"{self.budget!r}{hint}"
            )
        check_choice("cost", self.cost, COSTS)
        check_instance("limits", self.limits, Limits, "a Limits")
        check_instance("rates", self.rates, ChoiceRates, "a ChoiceRates")


def largest_within(
    budget: Budget, scores: Sequence[Tensor], ranks: Mapping[str, int] | None, limit: int
) -> list[Tensor]:
    """The units with the largest scores of all groups, as many as cost no more than a limit.

    Args:
        budget: The budget, which counts the cost.
        scores: For each group a tensor of shape ``(size,)`` on the CPU.
        ranks: Ranks by layer.
        limit: The limit.

    Returns:
        For each group a boolean tensor.
    """
    order = torch.cat([score.double() for score in scores]).argsort(descending=True, stable=True)
    sizes = [len(score) for score in scores]

    def first(count: int) -> list[Tensor]:
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[order[:count]] = True
        return list(chosen.split(sizes))

    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if budget.cost(first(middle), ranks) <= limit else (low, middle - 1)
    return first(low)


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


def rank_layers(
    model: nn.Module, layers: str | Sequence[str], keep: str | Sequence[str] | None, *, inputs: Any = None
) -> list[str]:
    """The layers whose ranks are to be chosen.

    Args:
        model: The model.
        layers: Names and globs.
        keep: Names and globs of layers that stay as they are.
        inputs: What the model takes, where only layers that its forward pass calls are counted. Globs pass over others.

    Returns:
        Names.

    Raises:
        ValueError: If there is none.
    """
    kept = select_kept(model, keep)
    found = {name: layer for name, layer in select_layers(model, layers).items() if name not in kept}
    names = [name for name, layer in found.items() if min(layer.weight.flatten(1).shape) > 1]
    if not names:
        raise ValueError(
            f"`layers`: {layers!r} must match a weight with two rows and columns or more that `keep` does not name"
        )
    called = names if inputs is None else _called(model, names, inputs)
    exact = {layers} if isinstance(layers, str) else set(layers)
    if lost := [name for name in names if name not in called and (name in exact or not called)]:
        raise ValueError(
            f"`layers`: {lost[0]!r} must be called in a forward pass of the example input, or its operations cannot be "
            "counted (as of a head that only the training step calls); leave it out, or count `cost='params'`"
        )
    return called


def _called(model: nn.Module, names: Sequence[str], inputs: Any) -> list[str]:
    """The layers that a forward pass calls."""
    modules, seen = clean_modules(model), set[str]()
    handles = [modules[name].register_forward_pre_hook(lambda *_, name=name: seen.add(name)) for name in names]
    try:
        run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in names if name in seen]
