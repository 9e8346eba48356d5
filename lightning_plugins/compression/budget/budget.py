"""The cost of a network with masks and ranks, as a number with a gradient; a choice within it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_choice, check_fraction, check_instance, check_text
from lightning_plugins.compression.budget.cost_terms import beyond_layers, count_terms
from lightning_plugins.compression.channels.group import ChannelGroup, check_groups
from lightning_plugins.compression.costs.layer_costs import COSTS, Cost
from lightning_plugins.compression.networks.arguments import check_module, check_tensors

_IN_PRODUCTS = ("least", "inner", "factor", "per_unit")  # of floating numbers: whole ones below 2 ** 53 stay exact


class Budget:
    """The cost of a whole network as a function of its masks and ranks, and the allowed cost.

    With ``n`` the sums of masks on both sides of a layer, its weight costs ``min(r * (n_in * k * k + n_out), n_in *
    k * k * n_out)`` parameters, and that times twice the places at which it is applied in operations. Biases, norms
    and all other parameters are counted too, and so are the products of an attention's heads. Once masks are zeros
    and ones and ranks whole numbers, the cost is exactly that of the smaller network: its number of parameters, or
    what `torch.utils.flop_counter` counts. All that stands in a residual block is multiplied by the block's mask.

    Args:
        model: The network before anything is removed, with masks and thresholds on it or without.
        groups: Its groups of channels and its blocks, those of the masks.
        ranks: The names of the layers whose weights may become low-rank, by scheme 1.
        target: The share of the cost that may be left, in (0, 1].
        cost: ``"params"`` or ``"flops"``.
        inputs: What the network takes, for ``"flops"``: a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises:
        ValueError: If an argument is outside of its range, a name is not that of a layer, or ``inputs`` is missing.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> from lightning_plugins.compression import channel_groups
        >>> budget = Budget(net, channel_groups(net, torch.zeros(1, 4)), target=0.5)
        >>> budget.dense, budget.limit, budget.cost([torch.arange(8) < 3])
        (58, 29, 23)

    Source:
        Eo et al., https://arxiv.org/abs/2309.13077: our reading.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup] = (),
        ranks: Sequence[str] = (),
        *,
        target: float,
        cost: Cost = "params",
        inputs: Any = None,
    ) -> None:
        if check_fraction("target", target) == 0:
            raise ValueError("`target` must be above 0, got 0; what is left of a network costs something")
        check_choice("cost", cost, COSTS)
        if cost == "params" and inputs is not None:
            raise ValueError("`inputs` must be left out with cost='params', for which nothing is run")
        check_module(model)
        check_groups(groups)
        for name in check_instance("ranks", ranks, (list, tuple), "a list of names of layers"):
            check_text("ranks", name, "a list of names of layers")
        self.groups, self.ranks, self.target = tuple(groups), tuple(ranks), target
        thresholds = model._modules.get("rank_thresholds")
        if thresholds is not None:
            thresholds.bypass = True  # type: ignore[assignment]  # a plain attribute of ours, not a tensor or module
        try:
            self._terms, self._constant = count_terms(model, groups, ranks, inputs, flops=cost == "flops")
        finally:
            if thresholds is not None:
                thresholds.bypass = False  # type: ignore[assignment]  # as above
        missing = set(range(len(self.ranks))) - set(self._terms.layer.tolist())
        if missing:
            raise ValueError(
                f"`ranks` must name layers that the cost counts, got {[self.ranks[i] for i in sorted(missing)]}"
            )
        self._device_terms: dict[torch.device, Any] = {}
        self.dense = self.cost()
        if cost == "flops":
            self._add_beyond_layers(beyond_layers(model, groups, inputs))
        self.limit = int(target * self.dense)
        self._has_units_beyond = bool(self._terms.per_unit.any())
        self._has_blocks = any(group.block for group in self.groups)

    def share(
        self,
        masks: Sequence[Tensor] | None = None,
        ranks: Mapping[str, Tensor] | Tensor | None = None,
        *,
        bend: Tensor | float = 1.0,
    ) -> Tensor:
        """The share of the dense cost that soft masks and ranks leave, with gradient to both.

        Args:
            masks: For every group a tensor of shape ``(..., size)`` in [0, 1], or one for all groups; None: all ones.
            ranks: For layers among those with ranks a tensor of shape ``(...)``; a layer that is missing is dense. Or
                one of shape ``(..., layers)`` for all of them.
            bend: 1 for the cost of the cheaper form, dense or factorised. 0 for that of the factorised form whatever
                the rank, so that the cost falls with the first singular value that is removed. Between, a weighted
                mean of both.

        Returns:
            Tensor of shape ``(...)`` in float64.
        """
        if isinstance(ranks, Mapping):
            ranks = self._in_order(ranks) if ranks else None
        given = [*(masks or ()), *([] if ranks is None else [ranks])]
        device = given[0].device if given else torch.device("cpu")
        terms = self._on(device)
        whole = masks or [torch.ones(terms.counts.shape[1], device=device)]
        units = (torch.cat(list(whole), dim=-1) if len(whole) > 1 else whole[0]).double()
        sizes = terms.least + units @ terms.counts.mT
        first, second = sizes[..., terms.first], sizes[..., terms.second] * terms.inner
        entries = first * second
        if ranks is not None:
            chosen = ranks.double()[..., terms.layer]  # of -1 the last, whatever it is: dense
            ranked = (terms.layer >= 0) & chosen.isfinite()
            low = torch.where(ranked, chosen, 0) * (first + second)
            low = _between(low, torch.minimum(low, entries), bend)
            entries = torch.where(ranked, low, entries)
        own = terms.per_unit * units if self._has_units_beyond else None
        if self._has_blocks:
            opened = torch.cat([units, torch.ones_like(units[..., :1])], dim=-1)  # the last: outside of all blocks
            entries = entries * opened[..., terms.block]
            own = None if own is None else own * opened[..., terms.block_of_unit]
        cost: Tensor = entries @ terms.factor + (0 if own is None else own.sum(-1)) + self._constant
        return cost / self.dense

    def soft_share(self, masks: Sequence[Tensor] | None, ranks: Mapping[str, Tensor]) -> Tensor:
        """As `share`, with a gradient to ranks also where they are so high that the dense layer is cheaper.

        No threshold would ever begin to rise otherwise.

        Args:
            masks: As for `share`.
            ranks: As for `share`.

        Returns:
            Scalar in float64.
        """
        if not ranks:
            return self.share(masks)
        share = self.share(masks, {name: rank.detach() for name, rank in ranks.items()})
        with torch.enable_grad():
            # At rank zero every layer is factorised, and its cost grows with the rank as that of factors does.
            none = {name: torch.zeros_like(rank, requires_grad=True) for name, rank in ranks.items()}
            fixed = None if masks is None else [mask.detach() for mask in masks]
            slopes = torch.autograd.grad(self.share(fixed, none), list(none.values()))
        for slope, rank in zip(slopes, ranks.values(), strict=True):
            share = share + (slope * (rank - rank.detach())).double()
        return share

    def cost(self, kept: Sequence[Tensor] | None = None, ranks: Mapping[str, int] | None = None) -> int:
        """The cost of the network that masks of zeros and ones and whole ranks leave, exactly.

        Args:
            kept: For every group a boolean tensor of shape ``(size,)``; None where all stay.
            ranks: Ranks by layer; a layer that is missing, or not smaller when factorised, is dense.

        Returns:
            The cost.

        Raises:
            ValueError: If ``kept`` does not fit the groups, or a layer has no rank here.
        """
        terms = self._terms
        if kept is not None:
            check_tensors("kept", kept)
            if [tuple(keep.shape) for keep in kept] != [(group.size,) for group in self.groups]:
                raise ValueError(
                    f"`kept` must have a tensor of shape (size,) for each of the {len(self.groups)} groups, got shapes "
                    f"{[tuple(keep.shape) for keep in kept]}"
                )
        check_instance("ranks", {} if ranks is None else ranks, Mapping, "ranks by names of layers")
        unknown = set(ranks or ()) - set(self.ranks)
        if unknown:
            raise ValueError(f"`ranks` must be of layers named in the constructor, got {sorted(unknown)}")
        everything = torch.ones(terms.counts.shape[1], dtype=torch.float64)
        units = torch.cat([keep.cpu().double() for keep in kept]) if kept else everything
        first, second = self._sides(units)
        entries = first * second
        if ranks:
            none = torch.iinfo(torch.int32).max
            rank = torch.tensor([*(int(ranks.get(name, none)) for name in self.ranks), none])[terms.layer]
            entries = torch.where(rank < none, torch.minimum(rank * (first + second), entries), entries)
        opened = torch.cat([units.long(), torch.ones(1, dtype=torch.int64)])
        layers, beyond = terms.factor * entries * opened[terms.block], terms.per_unit * units.long()
        return int(layers.sum() + (beyond * opened[terms.block_of_unit]).sum()) + self._constant

    def sides(self, kept: Sequence[Tensor] | None = None) -> dict[str, tuple[int, int]]:
        """The remaining rows and columns of the weights of the layers with ranks.

        Args:
            kept: As for `cost`.

        Returns:
            Rows and columns by layer.
        """
        everything = torch.ones(self._terms.counts.shape[1], dtype=torch.float64)
        first, second = self._sides(torch.cat([keep.cpu().double() for keep in kept]) if kept else everything)
        places = {int(layer): term for term, layer in enumerate(self._terms.layer.tolist()) if layer >= 0}
        return {name: (int(first[places[i]]), int(second[places[i]])) for i, name in enumerate(self.ranks)}

    def _in_order(self, ranks: Mapping[str, Tensor]) -> Tensor:
        infinite = torch.full_like(next(iter(ranks.values())), torch.inf, dtype=torch.float64)
        return torch.stack([ranks.get(name, infinite).double() for name in self.ranks], dim=-1)

    def _add_beyond_layers(self, decreases: Mapping[int, int]) -> None:
        sizes = [group.size for group in self.groups]
        for index, decrease in decreases.items():
            kept = [torch.arange(size) > (0 if place == index else -1) for place, size in enumerate(sizes)]
            beyond = decrease - (self.dense - self.cost(kept))
            self._terms.per_unit.split(sizes)[index].add_(beyond)
            block = int(self._terms.block_of_unit.split(sizes)[index][0])
            if block < sum(sizes):
                self._terms.per_unit[block] -= beyond * sizes[index]
            else:
                self._constant -= beyond * sizes[index]

    def _sides(self, units: Tensor) -> tuple[Tensor, Tensor]:
        terms = self._terms
        sizes = terms.least + (terms.counts @ units).long()  # sums of whole numbers below 2 ** 53 are exact
        return sizes[terms.first], sizes[terms.second] * terms.inner

    def _on(self, device: torch.device) -> Any:
        if device not in self._device_terms:
            terms = self._terms._replace(**{name: getattr(self._terms, name).double() for name in _IN_PRODUCTS})
            self._device_terms[device] = type(terms)(*(part.to(device) for part in terms))
        return self._device_terms[device]


class Projection(NamedTuple):
    """Decision of `project`.

    Attributes:
        kept: For every group a boolean tensor: which units stay.
        ranks: The ranks of the layers to factorise; the others stay dense.
        cost: The exact cost of the remaining network.
    """

    kept: list[Tensor]
    ranks: dict[str, int]
    cost: int


def _between(start: Tensor, end: Tensor, share: float | Tensor) -> Tensor:
    """Interpolate; a number stays on the CPU, since its copy to a device would be waited for."""
    return torch.lerp(start, end, share.to(start) if isinstance(share, Tensor) else share)
