"""Shift of all scores and thresholds at which a network meets its budget, and a multiplier of its cost."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_plugins._checks import check_finite_number, check_positive_number
from lightning_plugins.compression.budget.budget import Budget
from lightning_plugins.compression.gates.masks import ChannelMasks
from lightning_plugins.compression.gates.rank_thresholds import RankThresholds
from lightning_plugins.compression.gates.spectra import SpectrumTable
from lightning_plugins.functional.tensors import check_floating

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
        # What stays the same in every step is made once, and again if the model moves to another device.
        self._points = torch.linspace(0, 1, _POINTS, dtype=torch.float64)
        self._layers = torch.tensor([list(self.sizes).index(name) for name in budget.ranks if name in self.sizes])
        self._full = torch.tensor(list(self.sizes.values()))

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
        device = self.total.device
        self._points, self._layers, self._full = (x.to(device) for x in (self._points, self._layers, self._full))
        low = -self.total.double().clamp(0, _FURTHEST).reshape(1)
        high = torch.full_like(low, _FURTHEST)
        scores = None if self.masks is None else torch.cat(list(self.masks.scores))
        table = None if self.thresholds is None else SpectrumTable(spectra)
        for _ in range(_ROUNDS):
            shifts = torch.lerp(low, high, self._points)
            share = self._share(scores, self._ranks_at(shifts, table), shifts, bend=done)
            place = (share > wanted).sum(0, keepdim=True).clamp_max(_POINTS - 1)
            low, high = shifts.index_select(0, (place - 1).clamp_min(0)), shifts.index_select(0, place)
        ranks = self._ranks_at(high, table)
        share = self._share(scores, ranks, high)
        self.total += high[0].to(self.total)
        if self.masks is not None and scores is not None:
            fall = high.to(scores).repeat(len(scores)).split([len(part) for part in self.masks.scores])
            torch._foreach_sub_(list(self.masks.scores), fall)
        if self.thresholds is not None and table is not None:
            torch._foreach_copy_(list(self.thresholds.values), self._raised(high, table)[:, 0].unbind())
        return share[0], {} if ranks is None else dict(zip(self.sizes, ranks[0].unbind(), strict=True))

    def _share(self, scores: Tensor | None, ranks: Tensor | None, shifts: Tensor, bend: float = 1.0) -> Tensor:
        masks = None if scores is None else [(scores > shifts.to(scores)[:, None]).double()]
        return self.budget.share(masks, None if ranks is None else ranks[:, self._layers], bend=bend)

    def _ranks_at(self, shifts: Tensor, table: SpectrumTable | None) -> Tensor | None:
        """The ranks at several shifts, a row for each, by layer."""
        if self.thresholds is None or table is None:
            return None
        above = self._full - table.below(self._raised(shifts, table) * self.thresholds.scales[:, None]).mT
        return above.clamp_min(1).double()

    def _raised(self, shifts: Tensor, table: SpectrumTable) -> Tensor:
        """The thresholds of all layers at several shifts, in their own unit."""
        if self.thresholds is None:
            return shifts.new_zeros(0, len(shifts))
        scales = self.thresholds.scales
        highest = _HIGHEST * table.largest.to(scales) / scales
        values = torch.stack([value.detach() for value in self.thresholds.values])[:, None]
        return torch.minimum((values + self.exchange.to(values) * shifts.to(values)).clamp_min(0), highest[:, None])


class Multiplier:
    """A Lagrange multiplier that grows while a cost is above its target, and shrinks below it.

    The penalty is ``value * gap + damping / 2 * max(gap, 0) ** 2`` with ``gap = share / target - 1``.

    Args:
        rate: What the multiplier grows by per update and unit of the gap.
        damping: The weight of the square.

    Raises:
        ValueError: If an argument is negative.

    Example:
        >>> multiplier = Multiplier(rate=0.5)
        >>> multiplier.update(0.8, target=0.4)
        0.5
        >>> multiplier.penalty(torch.tensor(0.8), target=0.4)
        tensor(1.)
    """

    def __init__(self, rate: float = 0.05, damping: float = 1.0) -> None:
        for name, value in (("rate", rate), ("damping", damping)):
            if check_finite_number(name, value) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {value!r}")
        self.rate, self.damping, self.value = rate, damping, 0.0

    def penalty(self, share: Tensor, target: float) -> Tensor:
        """The term of the loss.

        Args:
            share: The share that is left, a scalar.
            target: The share that may be left.

        Returns:
            Scalar.

        Raises:
            TypeError: If ``share`` is no floating tensor, or ``target`` no number.
            ValueError: If ``target`` is not positive.
        """
        check_floating("share", share)
        gap = share / check_positive_number("target", target) - 1
        return self.value * gap + self.damping / 2 * gap.clamp_min(0).square()

    def update(self, share: float, target: float) -> float:
        """Update with the remaining cost fraction; once per optimizer step.

        Args:
            share: The share that is left.
            target: The share that may be left.

        Returns:
            The multiplier.

        Raises:
            TypeError: If an argument is no number.
            ValueError: If ``target`` is not positive, or ``share`` not finite.
        """
        check_finite_number("share", share)
        check_positive_number("target", target)
        self.value = max(0.0, self.value + self.rate * (share / target - 1))
        return self.value

    def state_dict(self) -> dict[str, float]:
        """The state as a primitive."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over a state.

        Args:
            state: From `state_dict`.
        """
        self.value = float(state["value"])
