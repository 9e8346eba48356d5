"""What a network costs before and after a compression, in all and per layer, in plain numbers."""

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from torch.utils.flop_counter import FlopCounterMode

from lightning_plugins.compression.cost import Cost, LayerCost, layer_costs, run
from lightning_plugins.regularizers._weight_matrices import Scheme


def example_inputs(trainer: Trainer, pl_module: LightningModule) -> Any:
    """The module's ``example_input_array`` on its device and in the training's precision; None if it has none."""
    inputs = trainer.precision_plugin.convert_input(pl_module.example_input_array)
    return move_data_to_device(inputs, pl_module.device)


def count(trainer: Trainer, pl_module: LightningModule) -> dict[str, int]:
    """Parameters, and with an ``example_input_array`` operations of a forward pass, of the whole network."""
    found = {"params": sum(parameter.numel() for parameter in pl_module.parameters())}
    inputs = example_inputs(trainer, pl_module)
    if inputs is not None:
        counter = FlopCounterMode(display=False)
        with trainer.precision_plugin.forward_context(), counter:
            run(pl_module, inputs)
        found["flops"] = counter.get_total_flops()
    return found


def count_layers(
    trainer: Trainer, pl_module: LightningModule, ranks: Mapping[str, int], scheme: Scheme
) -> dict[str, dict[str, Any]]:
    """Rank and costs before and after of each layer that is to be split, a pair of numbers for each cost."""
    inputs = example_inputs(trainer, pl_module)
    kinds: list[Cost] = ["params"] if inputs is None else ["params", "flops"]
    layers: dict[str, dict[str, Any]] = {name: {"rank": rank} for name, rank in ranks.items()}
    for kind in kinds:
        for name, cost in costs_of(trainer, pl_module, list(ranks), kind, scheme).items():
            layers[name][kind] = [cost.dense, cost.per_rank * ranks[name]]
    return layers


def costs_of(
    trainer: Trainer, pl_module: LightningModule, layers: list[str], cost: Cost, scheme: Scheme
) -> dict[str, LayerCost]:
    """The costs of layers, for ``"flops"`` those of a forward pass of the ``example_input_array``."""
    inputs = example_inputs(trainer, pl_module) if cost == "flops" else None
    with trainer.precision_plugin.forward_context():
        return layer_costs(pl_module, layers, cost=cost, inputs=inputs, scheme=scheme)
