"""Steps of the scores and thresholds of a compression: down the loss, and along the budget."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_plugins.distributed import is_distributed, world_size

_DECAY, _SQUARE_DECAY, _EPSILON = 0.9, 0.999, 1e-8
_FASTEST = 10.0  # of the multiplier: typical scores move by that many learning rates in a step, not more
_STATE = ("average", "squares", "steps", "multiplier")


class ChoiceOptimizer:
    """Adam without weight decay down the loss, and a Lagrange multiplier that is solved for in every step.

    The multiplier is what it takes, to first order, to bring the share of the cost to where it should be: parameters
    move along the share's gradient, scaled such that those of a kind move by their learning rate on average where the
    multiplier is 1. A multiplier that is a running sum of the excess instead reacts late, since scores have a way to
    go before a channel closes, and by then has grown so far that all of them close together.

    A step in which an entry of the loss's gradient is not finite leaves Adam as it is, and is found out without waiting
    for the device: that is what the steps are that a scaler leaves out in fp16.

    Args:
        kinds: Parameters of one kind, such as all scores, with their learning rate; all of one dtype and device.
    """

    def __init__(self, kinds: Sequence[tuple[Sequence[nn.Parameter], float]]) -> None:
        self.parameters = [parameter for parameters, _ in kinds for parameter in parameters]
        counts = [sum(parameter.numel() for parameter in parameters) for parameters, _ in kinds]
        self.slices = [slice(sum(counts[:i]), sum(counts[: i + 1])) for i in range(len(counts))]
        zeros = self._flat([None] * len(self.parameters))
        rates = [zeros.new_full((count,), rate) for count, (_, rate) in zip(counts, kinds, strict=True)]
        self.rates = torch.cat(rates)
        self.average, self.squares, self.steps = zeros, zeros.clone(), zeros.new_zeros(())
        self.multiplier = zeros.new_zeros(())

    @torch.no_grad()
    def step(self, slopes: Sequence[Tensor], excess: Tensor, unscale: Tensor | None = None) -> None:
        """Take a step, and forget the gradients; all ranks call.

        Args:
            slopes: For each parameter the gradient of the share of the cost, the same on all ranks.
            excess: How far the share is above where it should be; negative below.
            unscale: What the parameters' own gradients are multiplied by.
        """
        gradient = self._flat([parameter.grad for parameter in self.parameters])
        if is_distributed():
            dist.all_reduce(gradient)
            gradient /= world_size()  # as DDP does with all others
        if unscale is not None:
            gradient *= unscale
        change = self._adam(gradient) + self._along_budget(self._flat(slopes), excess)
        parts = change.split([parameter.numel() for parameter in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.sub_(part.view_as(parameter))
            parameter.grad = None

    def _adam(self, gradient: Tensor) -> Tensor:
        sound = gradient.isfinite().all()
        gradient = torch.where(sound, gradient, 0)
        average = torch.lerp(gradient, self.average, _DECAY)
        squares = torch.lerp(gradient.square(), self.squares, _SQUARE_DECAY)
        steps = self.steps + 1
        root = (squares / (1 - _SQUARE_DECAY**steps)).sqrt()
        change = self.rates * (average / (1 - _DECAY**steps)) / (root + _EPSILON)
        self.average = torch.where(sound, average, self.average)
        self.squares = torch.where(sound, squares, self.squares)
        self.steps = torch.where(sound, steps, self.steps)
        return torch.where(sound, change, 0)

    def _along_budget(self, slopes: Tensor, excess: Tensor) -> Tensor:
        tiny = torch.finfo(slopes.dtype).tiny ** 0.5
        scales = [slopes[part].square().mean().sqrt().clamp_min(tiny).expand_as(slopes[part]) for part in self.slices]
        direction = self.rates * slopes / torch.cat(scales)
        effect = (direction * slopes).sum().clamp_min(tiny)
        self.multiplier = (excess.to(effect) / effect).clamp(-_FASTEST, _FASTEST)
        return self.multiplier * direction

    def _flat(self, gradients: Sequence[Tensor | None]) -> Tensor:
        pairs = zip(gradients, self.parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if grad is None else grad).flatten() for grad, p in pairs])

    def state_dict(self) -> dict[str, Any]:
        """The averages and the number of steps."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: From `state_dict`.
        """
        for name in _STATE:
            setattr(self, name, state[name].to(self.rates))
