"""Linear maps from a student's features to a teacher's, trained outside the module."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins._lightning import Trainer
from lightning_plugins.distributed import is_distributed, world_size


class Projections:
    """One linear map for each layer whose width is not the teacher's, with an optimizer of its own.

    They are not among the module's parameters: neither its optimizer nor DDP nor a checkpoint's weights know of them.
    Their gradients come from the same backward pass and are averaged over the processes.

    Args:
        rate: The learning rate of Adam.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.weights: dict[str, nn.Parameter] = {}
        self._optimizer: torch.optim.Adam | None = None

    def __call__(self, label: str, features: Tensor, width: int) -> Tensor:
        """Map features to a width; the map is created at the first call, and again if their width changes.

        Args:
            label: The layer.
            features: Tensor of shape ``(..., d)``.
            width: The teacher's.

        Returns:
            Tensor of shape ``(..., width)``.
        """
        weight = self.weights.get(label)
        shape = width, features.shape[-1]
        if weight is None or tuple(weight.shape) != shape:
            kind = torch.promote_types(features.dtype, torch.float32)
            start = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / shape[1] ** 0.5  # same everywhere
            weight = self._add(label, start.to(features.device, kind))
        elif weight.device != features.device:
            weight = self._moved(features.device, label)
        return features.to(weight.dtype) @ weight.T

    def step(self, trainer: Trainer) -> None:
        """Step with the accumulated gradients, before the module's optimizer does.

        Args:
            trainer: The Trainer, whose precision plugin may have scaled the loss.
        """
        if self._optimizer is None:
            return
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        for weight in self.weights.values():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            if scaler is not None:
                weight.grad /= scaler.scale(torch.ones((), device=weight.device))
            if is_distributed():
                torch.distributed.all_reduce(weight.grad)
                weight.grad /= world_size()
            weight.grad.nan_to_num_(0.0, 0.0, 0.0)  # a scaled loss that was too large: the module's step is left out
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The maps and their optimizer's moments.

        Returns:
            Tensors and primitives.
        """
        moments = {}
        for label, weight in self.weights.items():
            known = {} if self._optimizer is None else self._optimizer.state.get(weight, {})
            moments[label] = {key: value.clone() for key, value in known.items()}
        return {"weights": {name: w.detach().clone() for name, w in self.weights.items()}, "moments": moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Args:
            state: As `state_dict` returns it.
        """
        self.weights, self._optimizer = {}, None
        for label, weight in state["weights"].items():
            added = self._add(label, weight.clone())
            if state["moments"][label] and self._optimizer is not None:
                self._optimizer.state[added] = {key: value.clone() for key, value in state["moments"][label].items()}

    def _add(self, label: str, start: Tensor) -> nn.Parameter:
        old = self.weights.get(label)
        self.weights[label] = weight = nn.Parameter(start)
        if self._optimizer is None:
            self._optimizer = torch.optim.Adam([weight], lr=self.rate)
            return weight
        parameters = self._optimizer.param_groups[0]["params"]
        if old is not None:
            self._optimizer.state.pop(old, None)
            parameters[:] = [parameter for parameter in parameters if parameter is not old]
        parameters.append(weight)
        return weight

    def _moved(self, device: torch.device, label: str) -> nn.Parameter:
        """Bring a map from a checkpoint to the device of the features."""
        weight = self.weights[label]
        weight.data = weight.data.to(device)
        known = {} if self._optimizer is None else self._optimizer.state.get(weight, {})
        for key, value in known.items():
            if value.ndim:
                known[key] = value.to(device)
        return weight
