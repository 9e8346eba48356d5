"""Run a model over calibration data."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[Any, Any], Any]


def check_forward(batches: Iterable[Any], forward: Forward | None, *, passes: int) -> None:
    """Check the batches and the forward function of a pass.

    Args:
        batches: The batches.
        forward: How the model takes one, or None.
        passes: How many times the batches are gone over.

    Raises:
        TypeError: If ``batches`` cannot be iterated over or ``forward`` not be called.
        ValueError: If several passes are needed over batches that can be iterated only once.

    Example:
        >>> check_forward([torch.zeros(2, 3)], None, passes=2)
    """
    if forward is not None and not callable(forward):
        raise TypeError(f"`forward` must be a function of model and batch, or None, got {type(forward).__name__}")
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        hint = "; put one batch into a list" if isinstance(batches, Tensor | Mapping) else ""
        raise TypeError(f"`batches` must be a loader, a list or another iterable, got {type(batches).__name__}{hint}")
    if passes > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"`batches` must give the same batches at every pass, of which `memory` makes {passes} necessary, got the "
            f"{type(batches).__name__}, which ends with the first; pass a list or a loader, or more `memory`"
        )


def model_pass(model: nn.Module, batch: Any, forward: Forward | None) -> Any:
    """Run a model on a batch.

    Args:
        model: The model.
        batch: The batch.
        forward: Called as ``forward(model, batch)``; None for ``model(batch)``, with a tuple or list as arguments and a
            mapping as keyword arguments.

    Returns:
        What the model returns.

    Raises:
        TypeError: If the model does not take the batch.

    Example:
        >>> model_pass(nn.Bilinear(2, 3, 4), (torch.zeros(5, 2), torch.zeros(5, 3)), None).shape
        torch.Size([5, 4])
    """
    if forward is not None:
        return forward(model, batch)
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, tuple | list) else model(batch)
    except TypeError as error:
        raise TypeError(
            f"`batches`: {type(model).__name__} does not take a {type(batch).__name__} as its arguments ({error}); "
            "pass `forward`, such as `forward=lambda model, batch: model(batch[0])`"
        ) from error


def placed(batch: Any, device: torch.device) -> Any:
    """A batch on a device.

    Args:
        batch: Tensors, or mappings, tuples and lists of them; other values stay as they are.
        device: The device.

    Returns:
        The same structure; a mapping becomes a dict.

    Example:
        >>> placed({"x": [torch.zeros(2)]}, torch.device("meta"))["x"][0].device
        device(type='meta')
    """
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: placed(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(placed(value, device) for value in batch))
    return type(batch)(placed(value, device) for value in batch) if isinstance(batch, tuple | list) else batch
