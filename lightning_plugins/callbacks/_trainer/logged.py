"""Numbers for the log."""

import torch
from torch import Tensor

from lightning_plugins._lightning import LightningModule


def on_device(value: Tensor | float, pl_module: LightningModule) -> Tensor:
    """A number as a tensor on the module's device, without waiting for the device as a copy to it does.

    Args:
        value: The number; a tensor stays as it is.
        pl_module: The module that logs it.

    Returns:
        A scalar.
    """
    return value if isinstance(value, Tensor) else torch.full((), float(value), device=pl_module.device)
