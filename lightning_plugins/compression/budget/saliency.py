"""Expected rise of the loss when a channel or a singular direction is removed, per cost saved."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_plugins.compression.budget.budget import Budget
from lightning_plugins.compression.budget.cost_terms import parameters_by_name
from lightning_plugins.compression.gates.masks import ChannelMasks
from lightning_plugins.compression.gates.rank_thresholds import RankThresholds
from lightning_plugins.compression.gates.segments import Segments
from lightning_plugins.compression.gates.threshold_function import Basis, wide_view
from lightning_plugins.distributed import is_distributed, world_size

_DECAY = 0.9
_OPEN = 0.1  # masks below it say nothing about their channel
_LEAST_COST = 1e-3  # of the average unit's: one that saves nothing is not worth more than a thousand others


class Saliency:
    """Squares of the loss's derivatives with respect to gates, averaged over the steps of a training.

    With a gate ``g`` on a channel or on a singular value, 1 where it is open, the loss without it is ``L - dL/dg +
    d2L/dg2 / 2`` to second order. The first term averages out over batches where the network is trained, and the
    second is estimated by the mean of ``(dL/dg) ** 2``, as by the Fisher information. Both derivatives follow from the
    gradients of the training: that of a channel's gate is the sum of ``W * dL/dW`` over the weights that
    compute it, that of a singular value's ``u.T @ dL/dW @ W.T @ u``. Those of the gates of blocks come from
    the backward pass, as long as the gates act. So channels, directions and blocks are measured alike, and divided by
    the share of the cost that leaves with them, they can be compared.

    Args:
        model: The model, with masks and thresholds or without.
        budget: What counts the cost.

    Source:
        Our reading of Molchanov et al., CVPR 2019, https://arxiv.org/abs/1906.10771, and of Liu et al., Group
        Fisher Pruning, ICML 2021, https://arxiv.org/abs/2108.00708, for the division by the cost. Directions are ours.
    """

    def __init__(self, model: nn.Module, budget: Budget) -> None:
        self.budget = budget
        tensors = parameters_by_name(model)
        device = next(iter(tensors.values())).device
        self._sizes = [group.size for group in budget.groups]
        self._members: list[tuple[Tensor, int]] = []
        units, start, total = [], 0, sum(self._sizes)
        for group in budget.groups:
            for member in group.members:
                if member.side in {"out", "norm"} and member.parameter in tensors:
                    self._members.append((tensors[member.parameter], member.dim))
                    places = torch.tensor(member.units)
                    units.append(torch.where(places >= 0, places + start, total))
            start += group.size
        self._sums = Segments(torch.cat(units), total).to(device) if units else None
        self._blocks = [place for place, group in enumerate(budget.groups) if group.block]
        self._of_channels = torch.tensor([not group.block for group in budget.groups for _ in range(group.size)]).to(
            device
        )
        self._weights = {name: tensors[f"{name}.weight"] for name in budget.ranks}
        costs = _costs(budget, device)
        self._unit_costs = torch.cat(costs) if costs else torch.zeros(0, device=device)
        self._squares = torch.zeros(total, device=device)
        self.weight = torch.zeros(total, device=device)  # by unit: gates of blocks act later than there are gradients

    @property
    def squares(self) -> list[Tensor]:
        """The sums of squares, by group."""
        return list(self._squares.split(self._sizes))

    @torch.no_grad()
    def observe(self, masks: ChannelMasks | None, unscale: Tensor | None = None) -> None:
        """Take the gradients of an optimizer step into account, unless one of them is not finite; all processes call.

        Args:
            masks: The masks that act, if any.
            unscale: What the derivatives of the masks of blocks are multiplied by.
        """
        if not len(self._squares):
            return
        slopes, seen = torch.zeros_like(self._squares), self._of_channels
        if self._sums is not None:
            slopes = self._sums.sums(torch.cat([part.to(self._squares) for part in self._products()]))
        if masks is not None and self._blocks:
            slopes, seen = self._with_blocks(slopes, masks, unscale), torch.ones_like(seen)
        sound = slopes.isfinite().all()
        decay = torch.where(sound & seen, _DECAY, 1.0).to(self._squares)
        new = torch.where(sound, slopes, 0).square()
        if masks is not None:
            mask, mean = masks.flat().to(new), self._squares / self.weight.clamp_min(1e-12)
            new = torch.where(mask > _OPEN, new / mask.clamp_min(_OPEN).square(), mean)
        self._squares = torch.lerp(new, self._squares, decay)
        self.weight = torch.lerp(torch.ones_like(self.weight), self.weight, decay)

    def _with_blocks(self, slopes: Tensor, masks: ChannelMasks, unscale: Tensor | None) -> Tensor:
        """The derivatives with those of the gates of blocks, the mean over all processes; blocks come last."""
        found = masks.block_slopes.take()
        zero = slopes.new_zeros(())
        of_blocks = torch.stack([found.get(place, zero).to(slopes) for place in self._blocks])
        if is_distributed():
            dist.all_reduce(of_blocks)
            of_blocks /= world_size()
        if unscale is not None:
            of_blocks *= unscale
        count = len(self._blocks)
        return torch.cat([slopes[:-count], of_blocks * masks.flat()[-count:].to(slopes)])

    def _products(self) -> list[Tensor]:
        """The sums of every parameter times its gradient over all dimensions but that of the units."""
        found: dict[int, Tensor] = {}
        vectors: dict[int, tuple[Tensor, Tensor]] = {}
        for place, (parameter, dim) in enumerate(self._members):
            if parameter.grad is None:
                found[place] = self._squares.new_zeros(parameter.shape[dim])
            elif parameter.ndim == 1:
                vectors[place] = (parameter, parameter.grad)
            else:
                others = [other for other in range(parameter.ndim) if other != dim]
                found[place] = (parameter * parameter.grad).sum(others)
        if vectors:
            products = torch._foreach_mul(*map(list, zip(*vectors.values(), strict=True)))
            found.update(zip(vectors, products, strict=True))
        return [found[place] for place in range(len(found))]

    @torch.no_grad()
    def directions(self, thresholds: RankThresholds) -> tuple[list[Tensor], list[Tensor]]:
        """The derivatives of an optimizer step with respect to gates on singular values.

        Args:
            thresholds: The thresholds, whose decompositions are used.

        Returns:
            For every layer the derivatives, in the order of rising singular values, and these values as shares of the
            largest. A layer without gradient has zeros.
        """
        slopes, spectra = [], []
        for step, name in zip(thresholds._steps, thresholds.layers, strict=True):
            weight, basis = self._weights[name], step._basis
            if basis is None:
                basis = Basis(*(torch.zeros((1,) * ndim, device=weight.device) for ndim in (2, 1, 0)))
            spectra.append(basis.values / basis.values.amax().clamp_min(torch.finfo(basis.values.dtype).tiny))
            if weight.grad is None:
                slopes.append(torch.zeros_like(basis.values))
                continue
            wide, _ = wide_view(weight.detach().to(basis.values))
            gradient = _like(weight, weight.grad.to(basis.values))
            slopes.append((basis.vectors * (gradient @ (wide.mT @ basis.vectors))).sum(0))
        return slopes, spectra

    def expected(self) -> Tensor:
        """Return for every unit of all groups the expected rise of the loss without it, up to a common factor."""
        return self._squares / self.weight.clamp_min(1e-12)

    def units(self) -> Tensor:
        """Return for every unit the root of the expected rise of the loss per cost saved; zeros where unknown."""
        return (self.expected() / self._unit_costs).sqrt()

    def state_dict(self) -> dict[str, Any]:
        """The averages, as tensors and primitives."""
        return {"squares": self.squares, "weight": self.weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: From `state_dict`.
        """
        if state["squares"]:
            self._squares = torch.cat([square.to(self._squares) for square in state["squares"]])
        self.weight = state["weight"].to(self.weight).expand_as(self._squares)  # once a scalar


def _costs(budget: Budget, device: torch.device) -> list[Tensor]:
    """Return the cost of a unit of every group in the dense network, as a share of the network's."""
    masks = [torch.ones(group.size, dtype=torch.float64, requires_grad=True) for group in budget.groups]
    if not masks:
        return []
    with torch.enable_grad():
        found = torch.autograd.grad(budget.share(masks), masks)
    least = float(torch.cat(found).mean() * _LEAST_COST)
    return [cost.clamp_min(least).float().to(device) for cost in found]


def _like(weight: Tensor, gradient: Tensor) -> Tensor:
    """A gradient as a matrix, its entries where `wide_view` has those of the weight."""
    order = [0, *sorted(range(1, weight.ndim), key=weight.stride, reverse=True)]
    matrix = gradient.permute(order).flatten(1)
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
