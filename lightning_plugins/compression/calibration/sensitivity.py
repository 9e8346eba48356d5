"""Sensitivity of the loss to an error in each layer's output."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.compression.calibration.masking import Mask, RowIndex, check_mask, mask_of
from lightning_plugins.compression.calibration.passes import check_forward, placed
from lightning_plugins.compression.low_rank.splittable import select_layers
from lightning_plugins.compression.networks.evaluation import evaluation, layer_by_layer, uncompiled
from lightning_plugins.distributed import is_distributed, sum_over_ranks


def output_sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    layers: str | Sequence[str] = "*",
    *,
    mask: Mask | None = None,
) -> dict[str, float]:
    """Measure the mean square of the loss's derivative by each layer's output, in one backward pass per batch.

    For an error of the output that is independent of this derivative and alike in all directions, the expected square
    of the change of the loss is this number times the error's energy. So it makes errors of different layers comparable
    for `output_energy`. The model runs in evaluation mode; its gradients are left as they are.

    Args:
        model: The model.
        batches: Batches, as for `Calibration.record`; in a process group each process brings its own.
        loss: Called as ``loss(model, batch)``; a scalar with a gradient, the mean over the batch.
        layers: Dotted name of a layer, a glob over names, or several of them.
        mask: Leaves padded tokens out, as for `Calibration`.

    Returns:
        The mean squares by layer name; 0 for a layer that the loss does not depend on.

    Raises:
        TypeError: If ``loss`` cannot be called or gives no tensor.
        ValueError: If there are no batches, the loss is not a scalar with a gradient, or a derivative is not finite.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2))
        >>> output_sensitivity(net, [torch.ones(5, 3)], lambda net, x: 3 * net(x).sum())
        {'0': 9.0}
    """
    if not callable(loss):
        raise TypeError(f"`loss` must be a function of model and batch, got {type(loss).__name__}")
    check_forward(batches, None, passes=1)
    found = select_layers(model, layers, transposed=True)
    device = next(iter(found.values())).weight.device
    sums = {name: torch.zeros(2, dtype=torch.float64, device=device) for name in found}
    generator, count = torch.Generator(), 0
    with evaluation(model), torch.enable_grad(), layer_by_layer(), uncompiled():
        for batch in batches:
            here = placed(batch, device)
            _add(model, here, loss, found, sums, RowIndex(mask_of(here, check_mask(mask)), generator))
            count += 1
    if is_distributed():
        count = int(sum_over_ranks(torch.tensor(float(count), device=device)))
        sums = {name: sum_over_ranks(one) for name, one in sums.items()}
    if count == 0:
        raise ValueError("`batches` must have at least one batch of calibration data, got none")
    result = {name: float(total / max(number, 1)) for name, (total, number) in _numbers(sums).items()}
    bad = [name for name, value in result.items() if not value < float("inf")]
    if bad:
        raise ValueError(f"`loss` must have finite derivatives, but that by the output of {bad[0]!r} is not")
    return result


def _numbers(sums: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: one.tolist() for name, one in sums.items()}


def _add(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any, Any], Tensor],
    layers: dict[str, Any],
    sums: dict[str, Tensor],
    index: RowIndex,
) -> None:
    outputs: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.requires_grad_()  # of layers that are frozen
            outputs.append((name, output))
            return output.clone()  # which may be changed in place

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        value = loss(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(value, Tensor):
        raise TypeError(f"`loss` must return a tensor, got {type(value).__name__}")
    if value.ndim or not value.requires_grad:
        raise ValueError(f"`loss` must return a scalar with a gradient, got shape {tuple(value.shape)}")
    gradients = torch.autograd.grad(value, [output for _, output in outputs], allow_unused=True)
    for (name, output), gradient in zip(outputs, gradients, strict=True):
        channels_last = output.movedim(1, -1) if isinstance(layers[name], nn.Conv1d | nn.Conv2d) else output
        where = index.rows(name, tuple(channels_last.shape[:-1]), output.device)
        rows = channels_last.shape[:-1].numel() if where is None else len(where)
        sums[name][1] += rows * channels_last.shape[-1]
        if gradient is not None:
            sums[name][0] += gradient.double().square().sum()
