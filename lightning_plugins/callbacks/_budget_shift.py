"""How far scores and thresholds move, all together, for a network to cost what it is to cost."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_plugins.compression._rank_thresholds import RankThresholds
from lightning_plugins.compression.budget import Budget
from lightning_plugins.compression.masks import ChannelMasks
from lightning_plugins.functional.masks import annealed_sigmoid

EXCHANGE = 0.3  # what thresholds rise by, in shares of the largest singular value, where scores fall by the mean norm
_FURTHEST = 8.0
_POINTS, _ROUNDS = 17, 4  # of the search: what is found is within 2 * 8 / 16 ** 4 of the solution


class BudgetShift:
    """Moves scores down and thresholds up, or back, in one direction, to where the network has a given cost.

    The cost falls along the direction, so that there is one such place, and it is found without a derivative, at
    several points at once, and without waiting for the device. A step along the gradient of the cost would do little
    where masks are nearly zeros and ones, and then too much.

    Scores move by the root of what their channels cost, so that of two channels of equal use the more expensive leaves
    first. Thresholds of all layers move alike.

    Args:
        budget: What counts the cost.
        masks: The masks, or None.
        thresholds: The thresholds, or None.
    """

    def __init__(self, budget: Budget, masks: ChannelMasks | None, thresholds: RankThresholds | None) -> None:
        self.budget, self.masks, self.thresholds = budget, masks, thresholds
        (self._beta,) = [part.beta for part in (masks, thresholds) if part is not None][:1]  # on the device
        self.sizes = {} if thresholds is None else {name: min(budget.sides()[name]) for name in thresholds.layers}
        full = {name: torch.tensor(float(size)) for name, size in self.sizes.items()}
        # Without the bend of its cost a layer of full rank is dearer in two than as one.
        self.whole = float(budget.share(None, full, bend=0.0))

    @torch.no_grad()
    def settle(self, spectra: Sequence[Tensor], done: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Move scores and thresholds.

        Args:
            spectra: For every layer with a threshold the singular values of its weight, in rising order.
            done: How much of what the budget takes is to be gone, in [0, 1].

        Returns:
            The share of the cost that is left, a scalar, and the ranks by layer.
        """
        table = self._table(spectra)
        directions = self.directions(spectra, done)
        wanted = self.whole + (self.budget.target - self.whole) * done
        low = torch.full((1,), -_FURTHEST, dtype=torch.float64, device=self._beta.device)
        high = -low
        for _ in range(_ROUNDS):
            shifts = torch.lerp(low, high, torch.linspace(0, 1, _POINTS, dtype=low.dtype, device=low.device))
            share = self.budget.share(self._masks_at(shifts, directions), self._ranks_at(shifts, table), bend=done)
            place = (share > wanted).sum(0, keepdim=True).clamp(1, _POINTS - 1)
            low, high = shifts.index_select(0, place - 1), shifts.index_select(0, place)
        share = self.budget.share(self._masks_at(high, directions), ranks := self._ranks_at(high, table))
        if self.masks is not None:
            for scores, direction in zip(self.masks.scores, directions, strict=True):
                scores.sub_(high.to(scores) * direction)
        if self.thresholds is not None:
            for value in self.thresholds.values:
                value.add_((EXCHANGE * high).to(value)[0]).clamp_(min=0)
        return share[0], {name: rank[0] for name, rank in ranks.items()}

    def directions(self, spectra: Sequence[Tensor], done: float) -> list[Tensor]:
        """For every group how fast its scores move: the root of what its units cost, with a mean square of 1.

        Args:
            spectra: As for `settle`.
            done: As for `settle`.

        Returns:
            Tensors of shape ``(size,)``.
        """
        if self.masks is None:
            return []
        with torch.no_grad():
            ranks = self._ranks_at(torch.zeros(1, dtype=torch.float64, device=self._beta.device), self._table(spectra))
        with torch.enable_grad():
            beta = self.masks.beta
            masks = [annealed_sigmoid(scores.detach(), beta).requires_grad_() for scores in self.masks.scores]
            share = self.budget.share(masks, {name: rank[0] for name, rank in ranks.items()}, bend=done)
            slopes = torch.autograd.grad(share, masks)
        mean = torch.cat(slopes).mean()
        return [(slope / mean).clamp_min(torch.finfo(slope.dtype).tiny ** 0.5).sqrt() for slope in slopes]

    def _masks_at(self, shifts: Tensor, directions: Sequence[Tensor]) -> list[Tensor]:
        if self.masks is None:
            return []
        beta = self.masks.beta
        pairs = zip(self.masks.scores, directions, strict=True)
        return [annealed_sigmoid(scores - shifts.to(scores)[:, None] * way, beta) for scores, way in pairs]

    def _ranks_at(self, shifts: Tensor, table: Tensor | None) -> dict[str, Tensor]:
        if self.thresholds is None or table is None:
            return {}
        values = torch.stack([value.detach() for value in self.thresholds.values])[:, None]
        raised = (values + EXCHANGE * shifts.to(values)).clamp_min(0) * self.thresholds.scales[:, None]
        below = torch.searchsorted(table, raised.to(table), right=True)
        rows = zip(self.sizes.items(), below, strict=True)
        return {name: (size - count).clamp_min(1).double() for (name, size), count in rows}

    def _table(self, spectra: Sequence[Tensor]) -> Tensor | None:
        """The singular values of all layers, each filled up with infinite ones that no threshold passes."""
        if not spectra:
            return None
        return torch.nn.utils.rnn.pad_sequence(list(spectra), batch_first=True, padding_value=torch.inf)
