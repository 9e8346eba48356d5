"""A network in evaluation mode for a while, and left as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module's mode and torch's generators are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    model.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad():  # a loader draws a seed at every pass
            yield
    finally:
        for module, mode in modes:
            module.training = mode
