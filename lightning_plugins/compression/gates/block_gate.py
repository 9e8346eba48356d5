"""The hook that applies a mask to a residual block as a whole."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.compression.channels.skipped import first_tensor, with_first


class BlockGate:
    """Turns a block's output ``f(x)`` into ``x + m * (f(x) - x)``, with ``m`` the mask of the block.

    A hard mask picks one of the two without waiting for the device, so that an open block computes what it computes
    without the hook. A copy of a network has gates of its own, with the masks of the copy.

    Args:
        masks: The masks.
        index: The number of the block's group.
    """

    def __init__(self, masks: Any, index: int) -> None:
        self.masks, self.index = masks, index

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """Return the output in its form, with the mask applied to its first tensor.

        Args:
            module: The block.
            args: Its arguments; the first tensor among them is its input.
            kwargs: Its keyword arguments.
            output: What it returned.

        Returns:
            The gated output.
        """
        given = first_tensor(args, kwargs)
        computed = output[0] if isinstance(output, tuple) else output
        if given is None:
            return output
        given, mask = given.to(computed.dtype), self.masks.mask(self.index)
        if self.masks.is_hard:
            return with_first(output, torch.where(mask > 0, computed, given))
        if mask.requires_grad:
            mask.register_hook(self._note)
        return with_first(output, torch.lerp(given, computed, mask.to(computed.dtype)))

    def _note(self, grad: Tensor | None) -> None:
        if grad is not None:  # the loss does not depend on it
            self.masks.block_slopes.add(self.index, grad)


class BlockSlopes:
    """The derivatives of the loss with respect to the masks of blocks, summed since they were last taken."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def add(self, index: int, slope: Tensor) -> None:
        """Add the derivative of a backward pass.

        Args:
            index: The number of the block's group.
            slope: The derivative, of one entry.
        """
        slope = slope.detach().reshape(())
        self._sums[index] = self._sums[index] + slope if index in self._sums else slope.clone()

    def take(self) -> dict[int, Tensor]:
        """Return the sums, and begin anew."""
        found, self._sums = self._sums, {}
        return found


def put_on_gate(block: nn.Module, gate: BlockGate) -> None:
    """Let a gate act on a block, before other hooks see the output.

    Args:
        block: The block.
        gate: The gate.
    """
    block.register_forward_hook(gate, prepend=True, with_kwargs=True)


def take_off_gates(model: nn.Module) -> None:
    """Remove the gates of all blocks of a model.

    Args:
        model: The model.
    """
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, BlockGate)]:
            del module._forward_hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)
