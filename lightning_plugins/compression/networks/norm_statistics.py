"""Running statistics of batch norms that fit the network as it is, after something before them has changed."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class NormStatistics:
    """Restarts the running statistics of a network's batch norms after an abrupt change of its channels or weights.

    The n-th batch after a jump counts for 1/n of the statistics, or for the norm's own momentum where that is more:
    they are the mean over the batches since, and nothing of the earlier network is left after one batch.

    Args:
        model: The network.

    Attributes:
        batches: Batches since the last jump; None before the first.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.batches: int | None = None
        self._own: list[tuple[Any, float]] = []

    def restart(self) -> None:
        """Restart after an abrupt change."""
        self.batches = 0

    def before_batch(self) -> None:
        """Set the weight of the next batch in the statistics."""
        self.after_batch()
        if self.batches is None:
            return
        self.batches += 1
        for norm in norms_with_statistics(self.model):
            if norm.momentum is not None and norm.momentum * self.batches < 1:
                self._own.append((norm, norm.momentum))
                norm.momentum = 1 / self.batches
        if not self._own:  # all norms use their own momentum again
            self.batches = None

    def after_batch(self) -> None:
        """Restore the norms' own momentum."""
        for norm, momentum in self._own:
            norm.momentum = momentum
        self._own.clear()


def norms_with_statistics(model: nn.Module) -> list[Any]:
    """The batch norms that keep running statistics.

    Args:
        model: The network.

    Returns:
        Norms.
    """
    kind = nn.modules.batchnorm._BatchNorm
    return [m for m in model.modules() if isinstance(m, kind) and m.track_running_stats and m.running_mean is not None]


@torch.no_grad()
def recalibrate(model: nn.Module, run: Callable[[Any], Any], batches: Iterable[Any]) -> None:
    """Recompute the running statistics of all batch norms as means over batches, without other changes.

    Args:
        model: The network. Norms that are in evaluation mode, as frozen ones are, keep theirs.
        run: Runs the network on a batch.
        batches: The batches.
    """
    norms = [norm for norm in norms_with_statistics(model) if norm.training]
    if not norms:
        return
    theirs = {id(buffer) for norm in norms for buffer in norm.buffers()}
    others = [(buffer, buffer.clone()) for buffer in model.buffers() if id(buffer) not in theirs]
    own = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    try:
        for count, batch in enumerate(batches, start=1):
            for norm in norms:
                norm.momentum = 1 / count
            run(batch)
    finally:
        for norm, momentum, tracked in own:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(tracked)
        for buffer, value in others:
            buffer.copy_(value)
