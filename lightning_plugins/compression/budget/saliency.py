"""Expected rise of the loss when a channel or a singular direction is removed, per cost saved."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.compression.budget.budget import Budget
from lightning_plugins.compression.budget.cost_terms import parameters_by_name
from lightning_plugins.compression.gates.masks import ChannelMasks
from lightning_plugins.compression.gates.rank_thresholds import RankThresholds
from lightning_plugins.compression.gates.threshold_function import Basis, wide_view

_DECAY = 0.9
_OPEN = 0.1  # masks below it say nothing about their channel
_LEAST_COST = 1e-3  # of the average unit's: one that saves nothing is not worth more than a thousand others


class Saliency:
    """Squares of the loss's derivatives with respect to gates, averaged over the steps of a training.

    With a gate ``g`` on a channel or on a singular value, 1 where it is open, the loss without it is ``L - dL/dg +
    d2L/dg2 / 2`` to second order. The first term averages out over batches where the network is trained, and the
    second is estimated by the mean of ``(dL/dg) ** 2``, as by the Fisher information. Both derivatives follow from the
    gradients of the training: that of a channel's gate is the sum of ``W * dL/dW`` over the weights that
    compute it, that of a singular value's ``u.T @ dL/dW @ W.T @ u``. So channels and directions are measured alike, and
    divided by the share of the cost that leaves with them, they can be compared.

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
        self._members: list[tuple[Tensor, int, Tensor, int]] = []
        for index, group in enumerate(budget.groups):
            for member in group.members:
                if member.side in {"out", "norm"} and member.parameter in tensors:
                    units = torch.tensor(member.units, device=device) % (group.size + 1)  # the last: not of this group
                    self._members.append((tensors[member.parameter], member.dim, units, index))
        self._weights = {name: tensors[f"{name}.weight"] for name in budget.ranks}
        self._unit_costs = _costs(budget, device)
        self.squares = [torch.zeros(group.size, device=device) for group in budget.groups]
        self.weight = torch.zeros((), device=device)

    @torch.no_grad()
    def observe(self, masks: ChannelMasks | None) -> None:
        """Take the gradients of an optimizer step into account, unless one of them is not finite.

        Args:
            masks: The masks that act, if any.
        """
        slopes = [square.new_zeros(len(square) + 1) for square in self.squares]
        for parameter, dim, units, index in self._members:
            if parameter.grad is not None:
                product = (parameter * parameter.grad).movedim(dim, 0).flatten(1 if parameter.ndim > 1 else 0)
                slopes[index].index_add_(0, units, (product.sum(1) if product.ndim > 1 else product).to(slopes[index]))
        if not slopes:
            return
        sound = torch.cat(slopes).isfinite().all()
        decay = torch.where(sound, _DECAY, 1.0)
        for index, slope in enumerate(slopes):
            new, mean = torch.where(sound, slope[:-1], 0).square(), self.squares[index] / self.weight.clamp_min(1e-12)
            if masks is not None:
                mask = masks.mask(index).to(new)
                new = torch.where(mask > _OPEN, new / mask.clamp_min(_OPEN).square(), mean)
            self.squares[index] = torch.lerp(new, self.squares[index], decay)
        self.weight = torch.lerp(torch.ones_like(self.weight), self.weight, decay)

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

    def expected(self) -> list[Tensor]:
        """Return for every unit the expected rise of the loss without it, up to a common factor."""
        return [square / self.weight.clamp_min(1e-12) for square in self.squares]

    def units(self) -> list[Tensor]:
        """Return for every unit the root of the expected rise of the loss per cost saved; zeros where unknown."""
        return [(one / cost).sqrt() for one, cost in zip(self.expected(), self._unit_costs, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """The averages, as tensors and primitives."""
        return {"squares": list(self.squares), "weight": self.weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: From `state_dict`.
        """
        self.squares = [new.to(old) for new, old in zip(state["squares"], self.squares, strict=True)]
        self.weight = state["weight"].to(self.weight)


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
