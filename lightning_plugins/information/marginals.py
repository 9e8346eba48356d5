"""Per-feature normalisation: invertible maps of single features do not change the mutual information."""

from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["standard", "normal"]
_KNOTS = 2048


class Marginals(nn.Module):
    """Standardise features, or map each to normal scores through its empirical distribution function.

    Normal scores are invariant to increasing maps of single features, and remove heavy tails.

    Args:
        rows: Shape ``(n, d)``, the rows to fit on.
        kind: ``"standard"`` for mean 0 and deviation 1, ``"normal"`` for normal scores.
    """

    shift: Tensor
    scale: Tensor
    knots: Tensor

    def __init__(self, rows: Tensor, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        spread = rows.std(dim=0)
        self.register_buffer("shift", rows.mean(dim=0))
        self.register_buffer("scale", torch.where(spread > 0, spread, torch.ones_like(spread)))
        count = min(len(rows), _KNOTS)
        places = ((torch.arange(count, device=rows.device) + 0.5) * len(rows) / count).long().clamp(max=len(rows) - 1)
        self.register_buffer("knots", rows.sort(dim=0).values[places].T.contiguous())  # (d, count)

    def forward(self, rows: Tensor) -> Tensor:
        """Transform rows.

        Returns:
            Shape ``(n, d)``; normal scores are clamped to the range of the fitted rows.
        """
        if self.kind == "standard":
            return (rows - self.shift) / self.scale
        columns, count = rows.T.contiguous(), self.knots.shape[1]
        left, right = (torch.searchsorted(self.knots, columns, right=side) for side in (False, True))
        below, above = (left - 1).clamp_min(0), left.clamp(max=count - 1)
        low, high = self.knots.gather(1, below), self.knots.gather(1, above)
        inside = below + torch.where(high > low, (columns - low) / (high - low), torch.zeros_like(columns))
        tied = (left + right - 1).to(columns) / 2  # the middle of equal knots
        level = (torch.where(right > left, tied, inside).clamp(0, count - 1) + 0.5) / count
        scores: Tensor = torch.special.ndtri(level)
        return scores.T
