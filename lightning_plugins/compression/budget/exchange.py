"""Exchange rate between thresholds on singular values and scores of channels, from the effect of each on the loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_plugins.compression.budget.saliency import Saliency
from lightning_plugins.compression.budget.shift import BudgetShift

_POINTS = 129
_HIGHEST = 0.9  # of a threshold, as a share of the largest singular value
_BOUNDS = (0.1, 10.0)  # of the change of the loss, beyond which a second-order estimate is not trusted


class Exchange:
    """The exchange rate of channels and singular values, found over the first few steps of a choice.

    Half of the reduction is reached by channels alone when all scores fall by ``T``, and by ranks alone when all
    thresholds rise by ``tau``; these are expected to raise the loss by ``L_c`` and ``L_r``. At the rate ``tau / T``
    both would contribute equally. As a quadratic loss is least where the cost is reduced in inverse proportion to these
    rises, the rate is ``tau / T * L_c / L_r``: both contribute, and the one that raises the loss less contributes more.

    Attributes:
        sums: Of ``T``, ``tau``, ``L_c`` and ``L_r`` over the steps looked at.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, device=device)

    @torch.no_grad()
    def look(self, shift: BudgetShift, saliency: Saliency, scores: Sequence[Tensor]) -> None:
        """Take an optimizer step's gradients into account, unless one of them is not finite.

        Args:
            shift: The shift with budget, masks and thresholds; these must have been decomposed for this step.
            saliency: The saliency, which has observed the gradients.
            scores: The scores without any shift.
        """
        if shift.thresholds is None:
            return
        wanted = (1 + shift.budget.target) / 2
        fall = _first_within(shift, wanted, torch.cat(list(scores)).amax(), scores, ())
        slopes, spectra = saliency.directions(shift.thresholds)
        rise = _first_within(shift, wanted, torch.full_like(fall, _HIGHEST), (), spectra)
        closed = torch.where(torch.cat(list(scores)) > fall, 0, saliency.expected())
        shrunk = [
            slope.square() * (rise / values.clamp_min(1e-12)).clamp_max(1).square()
            for slope, values in zip(slopes, spectra, strict=True)
        ]
        found = torch.stack([fall, rise, closed.sum(), torch.cat(shrunk).sum()]).to(self.sums)
        self.sums += torch.where(found.isfinite().all(), found, 0)

    def rate(self) -> Tensor:
        """Return the rise of thresholds, in shares of the largest singular value, when scores fall by one; a scalar."""
        fall, rise, of_channels, of_ranks = self.sums
        known = (of_ranks > 0) & (fall > 0) & (rise > 0)
        harm = (of_channels / torch.where(known, of_ranks, 1)).clamp(*_BOUNDS)
        return torch.where(known, rise / torch.where(known, fall, 1) * harm, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """The sums."""
        return {"sums": self.sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: From `state_dict`.
        """
        self.sums = state["sums"].to(self.sums)


def _first_within(
    shift: BudgetShift, wanted: float, most: Tensor, scores: Sequence[Tensor], spectra: Sequence[Tensor]
) -> Tensor:
    """The least of many shifts at which scores alone, or singular values alone, cost what is wanted."""
    shifts = torch.linspace(0, 1, _POINTS, device=most.device, dtype=torch.float64) * most
    masks = [(score > shifts.to(score)[:, None]).double() for score in scores] or None
    ranks: dict[str, Tensor] = {}
    if spectra and shift.thresholds is not None:
        table = pad_sequence(list(spectra), batch_first=True, padding_value=torch.inf)  # rising order
        below = torch.searchsorted(table, shifts.to(table).expand(len(table), -1).contiguous(), right=True)
        rows = zip(shift.sizes.items(), below, strict=True)
        ranks = {name: (size - count).clamp_min(1).double() for (name, size), count in rows}
    share = shift.budget.share(masks, ranks or None)
    place = (share > wanted).sum(0, keepdim=True).clamp(1, _POINTS - 1)
    return shifts.index_select(0, place)[0]
