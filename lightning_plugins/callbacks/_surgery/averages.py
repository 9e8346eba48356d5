"""Lightning's averages of weights, which hold a copy of the network, follow it through a surgery."""

from typing import Any

from torch import nn

from lightning_plugins._lightning import LightningModule, Trainer, callbacks


def averages_of(trainer: Trainer) -> list[Any]:
    """List the Trainer's ``WeightAveraging`` callbacks, ``EMAWeightAveraging`` among them."""
    kind = getattr(callbacks, "WeightAveraging", None)  # it is not in every version of Lightning
    return [one for one in trainer.callbacks if kind is not None and isinstance(one, kind)]  # type: ignore[attr-defined]  # a connector of the Trainer sets `callbacks`


def renew_averages(trainer: Trainer, pl_module: LightningModule) -> None:
    """Restart every weight average of a network with other shapes from a copy of the current module.

    There is no average of the small network's weights from before it was there, and none follows from that of the dense
    ones: the factors of a product are determined only up to a matrix between them.
    """
    for average in averages_of(trainer):
        held = average._average_model
        if held is not None and shapes_of(held.module) != shapes_of(pl_module):
            average.setup(trainer, pl_module, "fit")


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's parameters by name."""
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
