"""A transformers model without the places of its removed blocks, where its configuration can say how many are left."""

import copy
from typing import Any, TypeVar

from torch import nn

from lightning_plugins.compression.channels.skipped import Skipped
from lightning_plugins.compression.networks.pretrained import configuration_tells
from lightning_plugins.compression.structure.configuration import (
    BUILD_ERRORS,
    configurations,
    update_configuration,
)

M = TypeVar("M", bound=nn.Module)

_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
_KINDS = "layer_types"  # one for every block


def shallower(model: M) -> M:
    """Leave the removed blocks of a transformers model out and number the others anew.

    Args:
        model: The model; it is not changed.

    Returns:
        A copy without removed blocks, if a model of these names and shapes is built from its configuration; or else
        the model itself.
    """
    if not any(isinstance(module, Skipped) for module in model.modules()):
        return model
    small: Any = copy.deepcopy(model)
    for module in small.modules():
        if isinstance(module, nn.ModuleList) and any(isinstance(block, Skipped) for block in module):
            stay = [number for number, block in enumerate(module) if not isinstance(block, Skipped)]
            _count(small.config, len(module), stay)
            blocks = [module[number] for number in stay]
            module._modules.clear()
            module.extend(blocks)
    try:
        update_configuration(small)
        told = configuration_tells(small)
    except BUILD_ERRORS:
        return model
    return small if told else model


def _count(config: Any, before: int, stay: list[int]) -> None:
    """Set what counts this many blocks; a model that is built from it tells whether that was right."""
    for part in configurations(config):
        for key in (key for key in _COUNTS if getattr(part, key, None) == before):
            setattr(part, key, len(stay))
        kinds = getattr(part, _KINDS, None)
        if isinstance(kinds, list) and len(kinds) == before:
            setattr(part, _KINDS, [kinds[number] for number in stay])
