"""Costs of a network in training, run as its training runs it."""

from typing import Any

from lightning_plugins._lightning import LightningModule, Trainer, move_data_to_device
from lightning_plugins.compression.costs.layer_costs import Cost, LayerCost, arguments_of, layer_costs
from lightning_plugins.compression.costs.network_costs import NetworkCosts, measure_network
from lightning_plugins.weights import Scheme


def example_inputs(trainer: Trainer, pl_module: LightningModule) -> Any:
    """The module's ``example_input_array`` on its device and in the training's precision; None if it has none."""
    inputs = trainer.precision_plugin.convert_input(pl_module.example_input_array)
    return arguments_of(move_data_to_device(inputs, pl_module.device))


def network_costs(trainer: Trainer, pl_module: LightningModule) -> NetworkCosts:
    """Parameters, and with an ``example_input_array`` operations of a forward pass, of the whole network by layer."""
    with trainer.precision_plugin.forward_context():
        return measure_network(pl_module, example_inputs(trainer, pl_module), latency=False)


def costs_of(
    trainer: Trainer, pl_module: LightningModule, layers: list[str], cost: Cost, scheme: Scheme
) -> dict[str, LayerCost]:
    """The costs of layers, for ``"flops"`` those of a forward pass of the ``example_input_array``."""
    inputs = example_inputs(trainer, pl_module) if cost == "flops" else None
    with trainer.precision_plugin.forward_context():
        return layer_costs(pl_module, layers, cost=cost, inputs=inputs, scheme=scheme)
