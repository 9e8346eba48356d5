"""Scores of channels before the choice begins: at the saliency of the channels."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.compression.budget.budget import Budget
from lightning_plugins.compression.budget.cost_terms import parameters_by_name
from lightning_plugins.compression.budget.exchange import Exchange
from lightning_plugins.compression.budget.saliency import Saliency
from lightning_plugins.compression.budget.shift import BudgetShift
from lightning_plugins.compression.channels.group import ChannelGroup
from lightning_plugins.compression.gates.masks import ChannelMasks
from lightning_plugins.compression.gates.segments import Segments, numbers_of

_MEAN = 2.0  # of all scores: masks are nearly open
_LOOKS = 10  # optimizer steps over which channels and directions are compared


class ScoreTargets:
    """Scores that follow the saliency of their channels, with a mean of 2 before anything moves them.

    A score moves as far as twice the root of the expected rise of the loss per cost does, in units of the average over
    all groups; its own steps and those of the shift add up with that. A group without gradients, such as a frozen one,
    stays at the norms of its weights. Over the first few steps the loss also says how far thresholds rise where scores
    fall by one, so that channels and singular values of the same worth are removed together.

    Args:
        model: The model.
        budget: What counts its cost.
    """

    def __init__(self, model: nn.Module, budget: Budget) -> None:
        self.model, self.groups = model, budget.groups
        self.saliency = Saliency(model, budget)
        self.exchange = Exchange(next(model.parameters()).device)
        self.targets: list[Tensor] = []
        self.looks = 0
        self._numbers = numbers_of([group.size for group in self.groups])
        self._sums = Segments(self._numbers, len(self.groups))

    @torch.no_grad()
    def begin(self, shift: BudgetShift) -> None:
        """Let scores begin at the norms of weights.

        Args:
            shift: What holds the scores.
        """
        if shift.masks is not None:
            self.targets = [_MEAN * norms.to(shift.masks.scores[0]) for norms in weight_norms(self.model, self.groups)]
            for scores, target in zip(shift.masks.scores, self.targets, strict=True):
                scores.copy_(target)

    @torch.no_grad()
    def follow(self, shift: BudgetShift, unscale: Tensor | None = None) -> None:
        """Move scores along with the saliency, after a backward pass.

        Args:
            shift: What holds the scores and thresholds.
            unscale: What the derivatives of the masks of blocks are multiplied by.
        """
        if shift.masks is None:
            return
        self.saliency.observe(shift.masks, unscale)
        found, before = self.saliency.units(), torch.cat(self.targets)
        self._numbers, self._sums = self._numbers.to(found.device), self._sums.to(found.device)
        known = (self._sums.sums(found) > 0)[self._numbers]
        unit = (torch.where(known, found, torch.nan).nanmean() / _MEAN).nan_to_num(0.0)
        unit = unit.clamp_min(torch.finfo(found.dtype).tiny)
        after = torch.where(known, found / unit, before.to(found)).to(before)
        sizes = [len(target) for target in self.targets]
        self.targets = list(after.split(sizes))
        torch._foreach_add_(list(shift.masks.scores), (after - before).to(shift.masks.scores[0]).split(sizes))
        if shift.thresholds is not None and self.looks < _LOOKS:
            self.exchange.look(shift, self.saliency, self.targets)
            shift.exchange.copy_(self.exchange.rate())
            self.looks += 1

    def state_dict(self) -> dict[str, Any]:
        """Targets and averages, as tensors and primitives."""
        parts = {"saliency": self.saliency.state_dict(), "exchange": self.exchange.state_dict()}
        return {"targets": list(self.targets), "looks": self.looks, **parts}

    def load_state_dict(self, state: Mapping[str, Any] | None, masks: ChannelMasks | None) -> None:
        """Go on from a state.

        Args:
            state: From `state_dict`; None from the first version, whose scores move on from where they are.
            masks: They hold the scores; None where there are none, as before the choice begins.
        """
        if state is None:
            self.targets = [] if masks is None else [scores.detach().clone() for scores in masks.scores]
            return
        device = next(self.model.parameters()).device
        self.targets, self.looks = [target.to(device) for target in state["targets"]], int(state["looks"])
        self.saliency.load_state_dict(state["saliency"])
        self.exchange.load_state_dict(state["exchange"])


def weight_norms(model: nn.Module, groups: Sequence[ChannelGroup]) -> list[Tensor]:
    """For every unit the norm of the weights that compute it, with that of a group's average unit as 1.

    Args:
        model: The model.
        groups: Its groups of channels.

    Returns:
        For each group a tensor of shape ``(size,)`` on the CPU, in float64; of a block 1, as of an average channel.
    """
    tensors = parameters_by_name(model)
    found = []
    for group in groups:
        squares = torch.zeros(group.size + 1, dtype=torch.float64)
        for member in group.members:
            if member.side == "out" and tensors[member.parameter].ndim > 1:  # and is no bias
                weight = tensors[member.parameter].detach().double().movedim(member.dim, 0).flatten(1)
                units = torch.tensor(member.units) % len(squares)  # the last, at -1: not of this group
                squares.index_add_(0, units, weight.square().sum(1).cpu())
        norms = squares[:-1].sqrt() if not group.block else torch.ones_like(squares[:-1])
        found.append(norms / norms.mean().clamp_min(torch.finfo(norms.dtype).tiny))
    return found
