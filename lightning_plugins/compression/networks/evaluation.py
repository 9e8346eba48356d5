"""A network in evaluation mode for a while, and left as it was."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; restores every module's mode and torch's generators on exit."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    model.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad():  # a loader draws a seed at every pass
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Without the fast path of torch's attention: one fused operation that calls no layer and counts as nothing."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def uncompiled() -> AbstractContextManager[Any]:
    """Compiled code runs as it was written, so that hooks are called."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
