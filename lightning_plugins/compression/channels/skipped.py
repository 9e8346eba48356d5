"""Residual blocks that were removed: a module in their place that returns its input."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_int
from lightning_plugins.compression.low_rank.splittable import replace_modules
from lightning_plugins.compression.networks.pretrained import warn_when_saved

BUFFER = "skipped"
_PLACE = "layer_idx"  # of an attention in transformers: its place in the cache of keys and values
_KINDS = (str, int, float, type(None))


class Skipped(nn.Module):
    """Stands where a residual block was removed, and returns the first tensor that it is given.

    The names of all other modules stay the same. The block's plain attributes, numbers and text, stay too: some
    networks ask their blocks for them.

    Args:
        returns: The form of what the block returned: 0 for a tensor, n for a tuple of n entries. The first is the
            tensor, and the others are None.

    Attributes:
        skipped: An empty mark by which a state dict says that the block is skipped: a buffer without dimensions where
            the block returned a tensor, of shape ``(n,)`` where it returned a tuple.

    Raises:
        TypeError: If ``returns`` is not an int.
        ValueError: If it is negative.

    Example:
        >>> Skipped()(torch.ones(2)), Skipped(2)(torch.ones(1), None)
        (tensor([1., 1.]), (tensor([1.]), None))
    """

    skipped: Tensor

    def __init__(self, returns: int = 0) -> None:
        super().__init__()
        if check_int("returns", returns) < 0:
            raise ValueError(f"`returns` must be 0 for a tensor or the length of a tuple, got {returns!r}")
        shape = (returns,) if returns else ()
        self.register_buffer(BUFFER, torch.zeros(shape, dtype=torch.uint8))  # whatever the precision of the rest

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first tensor among the arguments, in the form in which the block returned its output.

        Args:
            *args: The block's arguments.
            **kwargs: Its keyword arguments.

        Returns:
            The tensor, or a tuple that begins with it.

        Raises:
            TypeError: If there is no tensor.
        """
        tensor = first_tensor(args, kwargs)
        if tensor is None:
            raise TypeError("a skipped block must be given a tensor to return, got none")
        return (tensor, *(None,) * (len(self.skipped) - 1)) if self.skipped.ndim else tensor


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor among the arguments of a call.

    Args:
        args: The arguments.
        kwargs: The keyword arguments.

    Returns:
        The tensor, or None.

    Example:
        >>> first_tensor((None,), {"mask": torch.ones(1)})
        tensor([1.])
    """
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def with_first(output: Any, tensor: Tensor) -> Any:
    """A block's output with another tensor in it.

    Args:
        output: A tensor, or a tuple that begins with one.
        tensor: The tensor to put there.

    Returns:
        The output in its form.

    Example:
        >>> with_first((torch.zeros(1), "rest"), torch.ones(1))
        (tensor([1.]), 'rest')
    """
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


def skip_modules(model: nn.Module, returns: Mapping[nn.Module, int]) -> None:
    """Exchange blocks for modules that return their input, wherever they stand.

    The attentions of the blocks that stay move up in the cache of keys and values, whose first entry tells how long
    the sequence is.

    Args:
        model: The model, changed in place.
        returns: By block the form of what it returned, as for `Skipped`.
    """
    reference = next(model.parameters(), None)
    replace_modules(model, {block: _in_place_of(block, form, reference) for block, form in returns.items()})
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and any(isinstance(block, Skipped) for block in module):
            _move_up(model, module)
    warn_when_saved(model)


def _in_place_of(block: nn.Module, form: int, reference: Tensor | None) -> Skipped:
    own = next(block.parameters(), reference)
    skipped = Skipped(form)
    if own is not None:
        skipped.to(own.device)
    skipped.train(block.training)
    plain = {key: value for key, value in vars(block).items() if not key.startswith("_") and isinstance(value, _KINDS)}
    vars(skipped).update(plain)
    return skipped


def _move_up(model: nn.Module, blocks: nn.ModuleList) -> None:
    if any(_tells_depth(module) for module in model.modules()):
        return
    stay = [block for block in blocks if not isinstance(block, Skipped)]
    for place, block in enumerate(stay):
        for module in block.modules():
            if isinstance(vars(module).get(_PLACE), int):
                setattr(module, _PLACE, place)


def _tells_depth(module: nn.Module) -> bool:
    """Return whether a module computes something else at another place among the blocks."""
    kinds: Any = getattr(getattr(module, "config", None), "layer_types", None) or ()
    return bool(getattr(module, "scale_attn_by_inverse_layer_idx", False)) or len(set(kinds)) > 1


def skipped_blocks(model: nn.Module) -> Iterator[tuple[str, Skipped]]:
    """The removed blocks of a model.

    Args:
        model: The model.

    Yields:
        Name and module.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Skipped):
            yield name, module
