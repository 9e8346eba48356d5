"""Thresholds on singular values as parametrizations of weights: a learned one per layer, and ranks with a gradient."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_positive_int
from lightning_plugins.compression.gates.masked_weight import scale_at_once
from lightning_plugins.compression.gates.masks import bake_masks, masks_of, remove_masks
from lightning_plugins.compression.gates.rank_thresholds import (
    RankThresholds,
    defer_row_mask,
    largest_singular_values,
)
from lightning_plugins.compression.gates.thresholded import Thresholded
from lightning_plugins.compression.low_rank.splittable import select_layers
from lightning_plugins.compression.networks.arguments import check_module, check_single
from lightning_plugins.compression.networks.parametrizations import clean_modules, put_on, take_off

NAME = "rank_thresholds"


def apply_thresholds(
    model: nn.Module,
    layers: str | Sequence[str] = "*",
    *,
    beta: float = 1.0,
    init: float = 0.0,
    refresh_every: int = 1,
) -> RankThresholds:
    """Lower the singular values of weights by a learned threshold, from now on.

    A weight, masked where there are masks (which must be put on first), acts as ``U diag(max(s - tau, 0)) V.T``, the
    matrix of scheme 1: exactly low-rank at every moment. The singular vectors and values come from one decomposition
    of the smaller Gram matrix, and the backward is a closed form that needs no other. On an accelerator, where the host
    would wait for each, only the first decomposition is exact, and those of `hard_ranks`, `margins` and `bake`: the
    others rotate the vectors of the one before by matrix products, for all layers of a shape at once.

    A decomposition is kept as long as neither weight nor mask change: it serves all batches that are accumulated. With
    ``refresh_every=k`` it also serves the next ``k - 1`` optimizer steps: they multiply the current weight by the
    ``U diag(max(1 - tau / s, 0)) U.T`` of the step with the decomposition, and keep its threshold. The gradient takes
    that matrix for a constant there, which saves a product, and what comes of its change with the weight is taken ``k``
    times as strong in the step with the decomposition. So the mean over ``k`` steps is the exact gradient, but for what
    the weight moves meanwhile.

    Args:
        model: The model, changed in place: the thresholds are parameters of its submodule ``rank_thresholds``.
        layers: Linear layers and convolutions without groups: a dotted name, a glob, or a sequence of them.
        beta: The inverse temperature of the soft ranks to begin with.
        init: The thresholds to begin with, as a share of the largest singular value.
        refresh_every: In how many optimizer steps every weight is decomposed once; 1 gives the exact gradient in every
            step, more give it on average and cost less.

    Returns:
        The thresholds.

    Raises:
        ValueError: If no layer fits, the model has thresholds already, or a number is outside of its range.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[4.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
        >>> thresholds = apply_thresholds(net, init=0.5)
        >>> net[0].weight.detach(), thresholds.hard_ranks()
        (tensor([[2., 0., 0.],
                [0., 0., 0.]]), {'0': 1})

    Source:
        Eo et al., https://arxiv.org/abs/2309.13077: our reading. The form of the gradient is ours.
    """
    if check_single("beta", beta) <= 0:
        raise ValueError(f"`beta` must be positive, got {beta!r}")
    if check_single("init", init) < 0:
        raise ValueError(f"`init` must be at least 0, got {init!r}")
    check_positive_int("refresh_every", refresh_every)
    if thresholds_of(model) is not None:
        raise ValueError("`model` must have no thresholds yet; remove the old ones with `remove_thresholds`")
    plain = model
    if masks_of(model) is not None:
        plain = copy.deepcopy(model)
        remove_masks(plain)
    chosen = [name for name, layer in select_layers(plain, layers).items() if min(layer.weight.flatten(1).shape) > 1]
    if not chosen:
        raise ValueError(f"`layers`: {layers!r} must match a weight with two rows and columns or more, got none")
    modules = clean_modules(model)
    with torch.no_grad():
        scales = largest_singular_values([_weight(modules[name]) for name in chosen])
    thresholds = RankThresholds(chosen, scales, beta=beta, init=init, refresh_every=refresh_every)
    model.add_module(NAME, thresholds)
    for index, name in enumerate(chosen):
        step = Thresholded(thresholds, index, modules[name])
        thresholds._steps.append(step)
        put_on(modules[name], "weight", step)
        defer_row_mask(modules[name])
    return thresholds


def thresholds_of(model: nn.Module) -> RankThresholds | None:
    """The thresholds of a model.

    Args:
        model: The model.

    Returns:
        The thresholds that `apply_thresholds` put on, or None.

    Raises:
        TypeError: If ``model`` is not a module.

    Example:
        >>> thresholds_of(nn.Linear(3, 2)) is None
        True
    """
    check_module(model)
    thresholds = model._modules.get(NAME)
    return thresholds if isinstance(thresholds, RankThresholds) else None


def remove_thresholds(model: nn.Module) -> None:
    """Remove the thresholds and restore the model, with the same parameters in the same order.

    Args:
        model: The model.

    Raises:
        ValueError: If it has no thresholds.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2))
        >>> thresholds = apply_thresholds(net)
        >>> remove_thresholds(net)
        >>> thresholds_of(net) is None
        True
    """
    if thresholds_of(model) is None:
        raise ValueError("`model` must have thresholds to remove, got none; `apply_thresholds` adds them")
    scale_at_once(model)
    for module in list(model.modules()):
        take_off(module, Thresholded, bake=False)
    del model._modules[NAME]


def bake(model: nn.Module) -> None:
    """Write hard masks and thresholds into the weights, and take both off; the parameters stay the same objects.

    Args:
        model: The model.

    Raises:
        ValueError: If it has neither masks nor thresholds.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[4.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
        >>> thresholds = apply_thresholds(net, init=0.5)
        >>> bake(net)
        >>> net[0].weight
        Parameter containing:
        tensor([[2., 0., 0.],
                [0., 0., 0.]], requires_grad=True)
    """
    masks, thresholds = masks_of(model), thresholds_of(model)
    if thresholds is None:
        bake_masks(model)
        return
    if masks is not None:
        masks.set_hard()
    modules = clean_modules(model)
    with torch.no_grad():
        lowered = {}
        for step, name in zip(thresholds._steps, thresholds.layers, strict=True):
            step.decompose_anew()
            lowered[name] = _weight(modules[name]).clone()
    remove_thresholds(model)
    if masks is not None:
        bake_masks(model)
    with torch.no_grad():
        for name, weight in lowered.items():
            _weight(modules[name]).copy_(weight)


def _weight(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]  # of layers that have one
    return weight
