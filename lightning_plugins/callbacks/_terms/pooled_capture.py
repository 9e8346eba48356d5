"""Forward hooks that remember embeddings, for callbacks that only look at them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.callbacks._terms.capture import LayerCapture, first_tensor
from lightning_plugins.functional.pooling import pool_embeddings


class PooledCapture(LayerCapture):
    """The embeddings in what named layers received or returned, without a gradient, while `recording`.

    They are pooled and copied in the hook: a later operation of the step may change the layer's tensor in place, as
    ``ReLU(inplace=True)`` does. Without a gradient such work saves nothing for the backward, so activation
    checkpointing does not mind it. A layer that does not run is left out.
    """

    def __init__(self, model: nn.Module, layers: str | Sequence[str], pool: str | Callable[[Tensor], Tensor]) -> None:
        super().__init__(model, layers, needs_gradient=False)
        self._pool = pool

    @property
    def labels(self) -> list[str]:
        """All layers, whether they run or not, in the same order on every rank."""
        return list(self._references)

    def take(self) -> dict[str, list[Tensor]]:
        """Hand over what was recorded.

        Returns:
            One tensor of shape ``(N, d)`` for each call, of the layers that were called.
        """
        taken = {label: list(tensors) for label, tensors in self._tensors.items() if tensors}
        self._clear()
        return taken

    def _remember(self, label: str, value: Any) -> None:
        features = first_tensor(value, label).detach()
        with torch.no_grad():
            try:
                self._tensors[label].append(pool_embeddings(features, self._pool).clone())
            except (TypeError, ValueError) as error:
                raise type(error)(f"`layers`: {label!r}: {error}") from error
