"""Shift of all scores and thresholds at which a network meets its budget."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_plugins.compression.budget.budget import Budget
from lightning_plugins.compression.gates.masks import ChannelMasks
from lightning_plugins.compression.gates.rank_thresholds import RankThresholds
from lightning_plugins.compression.gates.threshold_function import without_noise

_FURTHEST = 8.0
_HIGHEST = 0.9  # of a threshold, as a share of the largest singular value there is
_POINTS, _ROUNDS = 17, 4  # of the search: what is found is within 2 * 8 / 16 ** 4 of the solution


class BudgetShift:
    """Moves scores down and thresholds up, or back, in one direction, to where the network has a given cost.

    The cost falls along the direction, so that there is one such place. It is found without derivatives, evaluated at
    several points at once, and without waiting for the device. A step along the gradient of the cost would change
    little where masks are nearly zeros and ones, and then too much.

    Scores of all groups move alike, and so do the thresholds of all layers, which stop short of the largest singular
    value: a network with a weight of zeros cannot recover. A unit counts as long as its score is positive, as a
    singular value does as long as it is above its threshold, and nothing moves back beyond its starting point: where
    the cost is flat, as for a layer whose rank is too high to be worth factorising, scores and thresholds would drift
    apart.

    Args:
        budget: The budget, which counts the cost.
        masks: The masks, or None.
        thresholds: The thresholds, or None.

    Attributes:
        exchange: Rise of thresholds, in shares of the largest singular value, when scores fall by one.
        total: Fall of the scores so far.
    """

    def __init__(self, budget: Budget, masks: ChannelMasks | None, thresholds: RankThresholds | None) -> None:
        self.budget, self.masks, self.thresholds = budget, masks, thresholds
        (beta,) = [part.beta for part in (masks, thresholds) if part is not None][:1]  # on the device
        self.exchange, self.total = torch.ones_like(beta), torch.zeros_like(beta)
        self.sizes = {} if thresholds is None else {name: min(budget.sides()[name]) for name in thresholds.layers}
        full = {name: torch.tensor(float(size)) for name, size in self.sizes.items()}
        # Without the correction a factorised layer at full rank costs more than the dense one.
        self.whole = float(budget.share(None, full, bend=0.0))

    @torch.no_grad()
    def settle(self, spectra: Sequence[Tensor], done: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Move scores and thresholds.

        Args:
            spectra: For every layer with a threshold the singular values of its weight, in rising order.
            done: The part of the reduction that is to be reached, in [0, 1].

        Returns:
            The fraction of the cost that is left, a scalar, and the ranks by layer.
        """
        wanted = self.whole + (self.budget.target - self.whole) * done
        low = -self.total.double().clamp(0, _FURTHEST).reshape(1)
        high = torch.full_like(low, _FURTHEST)
        for _ in range(_ROUNDS):
            shifts = torch.lerp(low, high, torch.linspace(0, 1, _POINTS, dtype=low.dtype, device=low.device))
            share = self.budget.share(self._masks_at(shifts), self._ranks_at(shifts, spectra), bend=done)
            place = (share > wanted).sum(0, keepdim=True).clamp_max(_POINTS - 1)
            low, high = shifts.index_select(0, (place - 1).clamp_min(0)), shifts.index_select(0, place)
        ranks = self._ranks_at(high, spectra)
        share = self.budget.share(self._masks_at(high), ranks)
        self.total += high[0].to(self.total)
        if self.masks is not None:
            for scores in self.masks.scores:
                scores.sub_(high.to(scores))
        if self.thresholds is not None:
            for value, raised in zip(self.thresholds.values, self._raised(high, spectra), strict=True):
                value.copy_(raised[0])
        return share[0], {name: rank[0] for name, rank in ranks.items()}

    def _masks_at(self, shifts: Tensor) -> list[Tensor]:
        if self.masks is None:
            return []
        return [(scores > shifts.to(scores)[:, None]).double() for scores in self.masks.scores]

    def _ranks_at(self, shifts: Tensor, spectra: Sequence[Tensor]) -> dict[str, Tensor]:
        if self.thresholds is None:
            return {}
        # Infinite values, which no threshold passes, fill the rows of smaller layers.
        table = pad_sequence(
            [without_noise(spectrum) for spectrum in spectra], batch_first=True, padding_value=torch.inf
        )
        raised = self._raised(shifts, spectra) * self.thresholds.scales[:, None]
        below = torch.searchsorted(table, raised.to(table), right=True)
        rows = zip(self.sizes.items(), below, strict=True)
        return {name: (size - count).clamp_min(1).double() for (name, size), count in rows}

    def _raised(self, shifts: Tensor, spectra: Sequence[Tensor]) -> Tensor:
        """The thresholds of all layers at several shifts, in their own unit."""
        if self.thresholds is None:
            return shifts.new_zeros(0, len(shifts))
        scales = self.thresholds.scales
        highest = _HIGHEST * torch.stack([values[-1] for values in spectra]).to(scales) / scales
        values = torch.stack([value.detach() for value in self.thresholds.values])[:, None]
        return torch.minimum((values + self.exchange.to(values) * shifts.to(values)).clamp_min(0), highest[:, None])
