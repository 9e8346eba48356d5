"""Decompositions of the weights of all layers of a step together, on devices where each by itself would wait."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_plugins.compression.gates.masked_weight import Masked
from lightning_plugins.compression.gates.threshold_function import Basis, Lowering, follow_wide, lowering, wide_view
from lightning_plugins.functional.spectrum import at_least_float32

Stacked = TypeVar("Stacked", Basis, Lowering)


def follows(weight: Tensor) -> bool:
    """Tell whether decompositions follow those of a step before.

    On a CPU an exact one is cheap. An accelerator waits for the host in it, and does one matrix after another.

    Args:
        weight: A weight.

    Returns:
        Whether they do.
    """
    return weight.device.type != "cpu"


def follow_together(steps: Sequence[Any]) -> list[Basis]:
    """New decompositions from the present ones; all matrices with the same number of rows are one batch.

    Args:
        steps: Parametrizations with thresholds that have a decomposition.

    Returns:
        For each its basis.
    """
    return _in_batches(
        steps, lambda chosen: follow_wide(_grams(chosen), torch.stack([step.basis.vectors for step in chosen]))
    )


def lower_together(steps: Sequence[Any]) -> list[Lowering]:
    """The matrices that lower singular values by the thresholds, with divided differences, in the same batches.

    Args:
        steps: Parametrizations with thresholds that have a decomposition.

    Returns:
        For each its matrices.
    """
    return _in_batches(steps, _lower)


def _lower(steps: Sequence[Any]) -> Lowering:
    basis = Basis(*(torch.stack(parts) for parts in zip(*(step.basis for step in steps), strict=True)))
    values, units = zip(*(step.threshold() for step in steps), strict=True)
    unit = torch.stack(units).to(basis.values)
    tau = torch.stack(values).to(basis.values).clamp_min(0) * unit
    held = [step.held_level() for step in steps]
    if any(level is not None for level in held):
        tau = torch.stack([new if old is None else old for new, old in zip(tau.unbind(), held, strict=True)])
    return lowering(basis, tau, unit, differences=True)


def _in_batches(steps: Sequence[Any], compute: Callable[[list[Any]], Stacked]) -> list[Stacked]:
    """Compute a tuple of stacked tensors for each batch of steps, and take them apart again."""
    found: dict[int, Stacked] = {}
    with torch.inference_mode(mode=False), torch.no_grad():
        for places in _batches(steps):
            stacked: Any = compute([steps[place] for place in places])
            found.update(zip(places, map(stacked._make, zip(*map(torch.unbind, stacked), strict=True)), strict=True))
    return [found[place] for place in range(len(steps))]


def _batches(steps: Sequence[Any]) -> list[list[int]]:
    batches: dict[Any, list[int]] = {}
    for place, step in enumerate(steps):
        vectors = step.basis.vectors
        batches.setdefault((vectors.shape, vectors.dtype, vectors.device), []).append(place)
    return list(batches.values())


def _grams(steps: Sequence[Any]) -> Tensor:
    """The products of masked weights with their transpositions."""
    grams, scales = [], []
    for step in steps:
        wide, scale = _masked_values(step)
        grams.append(wide @ wide.mT)
        scales.append(scale)
    gram = torch.stack(grams)
    if any(scale is not None for scale in scales):
        ones = gram.new_ones(gram.shape[-1])
        scale = torch.stack([ones if one is None else one.to(gram) for one in scales])
        gram.mul_(scale[:, :, None]).mul_(scale[:, None, :])
    return gram


def _masked_values(step: Any) -> tuple[Tensor, Tensor | None]:
    """The weight that a threshold acts on as a wide matrix, and the factors of its rows, without gradients."""
    steps = step.steps()
    weight, scale = steps.original.detach(), None
    for other in steps:
        if other is step:
            break
        if isinstance(other, Masked) and other.deferred:
            scale = other.values()[0]
        elif isinstance(other, Masked):
            for dim, factor in other.values().items():
                shape = [-1 if place == dim else 1 for place in range(weight.ndim)]
                weight = weight * factor.to(weight.dtype).reshape(shape)
        else:
            weight = other(weight)
    return wide_view(at_least_float32(weight))[0], scale
