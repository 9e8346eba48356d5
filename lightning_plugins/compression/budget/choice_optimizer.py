"""Steps of the scores and thresholds of a compression, down the loss."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_plugins.compression.gates.segments import Segments, numbers_of
from lightning_plugins.distributed import is_distributed, world_size

_DECAY, _SQUARE_DECAY, _EPSILON = 0.9, 0.999, 1e-12
_STATE = ("average", "squares", "steps")


class ChoiceOptimizer:
    """Adam without weight decay, and with one second moment for all parameters of a kind.

    With a second moment for every parameter each would move by the learning rate, whatever the size of its gradient, so
    that a useful channel and one with nothing but noise would move equally far. With a common one the channel with the
    larger gradient moves further.

    The mean of the gradients of a group of scores is subtracted. A norm after the layer undoes a common scale of all
    its channels, so that this part is noise; following it would close whole layers. The share of a group is decided by
    norms of weights and by the saliency of its single channels. The score of a block is one for itself.

    A step in which an entry of the gradient is not finite changes nothing, and is detected without waiting for the
    device: these are the steps that a scaler skips in fp16.

    Args:
        kinds: Parameters of one kind, such as all scores; all of one dtype and device.
    """

    def __init__(self, kinds: Sequence[Sequence[nn.Parameter]]) -> None:
        self.parameters: list[Tensor] = [parameter for parameters in kinds for parameter in parameters]
        self.counts = [sum(parameter.numel() for parameter in parameters) for parameters in kinds]
        self.average = torch.cat([torch.zeros_like(parameter).flatten() for parameter in self.parameters])
        self.squares, self.steps = self.average.new_zeros(len(kinds)), self.average.new_zeros(())
        sizes = [parameter.numel() for parameter in self.parameters]
        self._sizes, device = sizes, self.average.device
        self._numbers = numbers_of(sizes)
        self._sums = Segments(self._numbers, len(sizes)).to(device)
        self._numbers = self._numbers.to(device)
        # A threshold and the score of a block are alone: nothing is subtracted.
        shared = [size if size > 1 else torch.inf for size in sizes]
        self._shared = self.average.new_tensor(shared)
        self._kinds = numbers_of(self.counts).to(device)

    @torch.no_grad()
    def step(self, rates: Sequence[float], unscale: Tensor | None = None) -> None:
        """Take a step, and forget the gradients; all processes call.

        Args:
            rates: For every kind the step size of a typical parameter.
            unscale: What the parameters' own gradients are multiplied by.
        """
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        gradient = torch.cat([grad.flatten() for grad in grads])
        gradient = gradient - (self._sums.sums(gradient) / self._shared)[self._numbers]
        if is_distributed():
            dist.all_reduce(gradient)
            gradient /= world_size()  # as DDP does with all others
        if unscale is not None:
            gradient *= unscale
        sound = gradient.isfinite().all()
        gradient = torch.where(sound, gradient, 0)
        average = torch.lerp(gradient, self.average, _DECAY)
        squares = torch.stack([part.square().mean() for part in gradient.split(self.counts)])
        squares = torch.lerp(squares, self.squares, _SQUARE_DECAY)
        steps = self.steps + 1
        roots = (squares / (1 - _SQUARE_DECAY**steps)).sqrt() + _EPSILON
        scale = torch.stack([root.reciprocal() * rate for rate, root in zip(rates, roots, strict=True)])[self._kinds]
        change = torch.where(sound, average / (1 - _DECAY**steps) * scale, 0)
        self.average = torch.where(sound, average, self.average)
        self.squares = torch.where(sound, squares, self.squares)
        self.steps = torch.where(sound, steps, self.steps)
        parts = change.split(self._sizes)
        torch._foreach_sub_(self.parameters, [p.view_as(q) for p, q in zip(parts, self.parameters, strict=True)])
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The averages and the number of steps."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: From `state_dict`.
        """
        for name in _STATE:
            setattr(self, name, state[name].to(self.average))
