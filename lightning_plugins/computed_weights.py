"""Weights computed from parameters by parametrizations, weight norms or pruning."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def current_weight(module: nn.Module, name: str) -> Tensor:
    """Compute a weight from the current parameters.

    Pruning and torch's older weight norms compute a weight before each forward pass and store it as an attribute, which
    is outdated after an optimizer step.

    Args:
        module: The module that holds the weight.
        name: The weight's name in it.

    Returns:
        The parameter itself, or the computed weight with its graph.
    """
    if name not in module._parameters:
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
                pruned: Tensor = hook.apply_mask(module)
                return pruned
            if isinstance(hook, WeightNorm) and hook.name == name:
                normed: Tensor = hook.compute_weight(module)
                return normed
            if isinstance(hook, SpectralNorm) and hook.name == name:
                scaled: Tensor = hook.compute_weight(module, do_power_iteration=False)
                return scaled
    weight: Tensor = getattr(module, name)
    return weight


@contextmanager
def parametrizations_at_rest(module: nn.Module) -> Iterator[None]:
    """Compute weights in evaluation mode: in training some, such as `spectral_norm`, update a buffer each time."""
    busy = [
        part
        for parametrizations in module.modules()
        if isinstance(parametrizations, ParametrizationList)
        for part in parametrizations.modules()
        if part.training
    ]
    for part in busy:
        part.training = False
    try:
        yield
    finally:
        for part in busy:
            part.training = True
