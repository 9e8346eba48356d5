"""Metrics whose states are sums in double precision."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class SumMetric(Metric):
    """A metric whose floating states are float64 sums, or float32 sums on devices without float64, such as MPS."""

    is_differentiable = False
    full_state_update = False  # the update does not depend on the previous state

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        try:
            return super()._apply(fn, exclude_state)
        except TypeError:  # raised before any state was moved, since the first one is a float64 sum
            for name, default in self._defaults.items():
                if isinstance(default, Tensor) and default.dtype == torch.float64:
                    self._defaults[name] = default.float()
                    setattr(self, name, getattr(self, name).float())
            return super()._apply(fn, exclude_state)
