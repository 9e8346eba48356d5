"""Probe the layers of any network over any loader, without a Trainer."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_callable, check_instance, shown
from lightning_plugins._lightning import move_data_to_device
from lightning_plugins.callbacks._probes.rows import Positions, RowSelection
from lightning_plugins.callbacks._probes.session import ProbeSession, check_options
from lightning_plugins.metrics import ProbeResult
from lightning_plugins.selection import check_layers


def probe_layers(
    model: nn.Module,
    loader: Iterable[Any],
    layers: str | Sequence[str],
    targets: str | int | Callable[[Any], Tensor],
    *,
    groups: str | int | Callable[[Any], Tensor] | None = None,
    mask: str | int | Callable[[Any], Tensor] | None = None,
    positions: Positions = "mean",
    probe: Mapping[str, Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, ProbeResult]:
    """Probe layers of a network in one pass over a loader.

    The network runs in evaluation mode without gradients, and is left as it was. Within a process group all processes
    must call, each with its own part of the data; all get the result of all rows.

    Args:
        model: Any module.
        loader: Any iterable of batches; tensors in them are moved to the device of the model's first parameter.
        layers: As for `LayerProbe`.
        targets: As for `LayerProbe`.
        groups: As for `LayerProbe`.
        mask: As for `LayerProbe`.
        positions: As for `LayerProbe`.
        probe: Further arguments of `lightning_plugins.metrics.LinearProbe`.
        forward: Runs the model on a batch. None calls it with the entries of a mapping that its ``forward`` names,
            with the first entry of a sequence, or with a tensor.

    Returns:
        What was found, by layer.

    Raises:
        ValueError: If an argument is out of its range, or the rows allow no fit.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(60, 4)
        >>> found = probe_layers(net, [(x[:30], x[:30, 0]), (x[30:], x[30:, 0])], ["0", "2"], targets=1)
        >>> found["0"].r2 > 0.99
        tensor(True)
    """
    check_instance("model", model, nn.Module, "a module")
    if isinstance(loader, str | bytes) or not hasattr(loader, "__iter__"):
        raise TypeError(f"`loader` must be a DataLoader or another iterable of batches, got {shown(loader)}")
    if forward is not None:
        check_callable("forward", forward, "a function of the model and a batch")
    rows = RowSelection(targets, groups, mask, positions)
    session = ProbeSession(model, check_layers(layers), rows, check_options(probe), ("all",))
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for batch in loader:
            session.batch = move_data_to_device(batch, device)
            with torch.no_grad(), session.recording():
                (forward or _call)(model, session.batch)
            session.add("all")
        return session.results("all", device, strict=True)
    finally:
        session.detach()
        for module, training in modes.items():
            module.training = training


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        known = inspect.signature(model.forward).parameters
        return model(**{name: value for name, value in batch.items() if name in known})
    return model(batch if isinstance(batch, Tensor) else batch[0])
