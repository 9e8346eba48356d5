"""Forward hooks that remember embeddings, for callbacks that only look at them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins._lightning import MisconfigurationException, rank_zero_warn
from lightning_plugins.callbacks._rows.capture import LayerRows
from lightning_plugins.callbacks._rows.masks import LayerCall
from lightning_plugins.callbacks._rows.readout import Readout


class ObservedRows(LayerRows):
    """The rows of named layers, without a gradient, while `recording`.

    They are pooled and copied in the hook: a later operation of the step may change the layer's tensor in place, as
    ``ReLU(inplace=True)`` does. Without a gradient such work saves nothing for the backward, so it does not affect
    activation checkpointing. A layer that does not run is left out, and so is, with one warning, a layer whose rows
    can't be read: a monitor never ends a training.

    Args:
        model: The model.
        layers: As for `select_tensors`.
        rows: How tensors become rows.
    """

    def __init__(self, model: nn.Module, layers: str | Sequence[str], rows: Readout) -> None:
        super().__init__(model, layers, rows, needs_gradient=False)
        self._kept: dict[str, list[Tensor]] = {label: [] for label in self.labels}
        self.left_out: dict[str, str] = {}  # layers that could not be read, and why

    def take(self) -> dict[str, list[Tensor]]:
        """Return the recorded tensors.

        Returns:
            One tensor of shape ``(N, d)`` for each call, of the layers that were called and can be read.
        """
        taken = {label: list(kept) for label, kept in self._kept.items() if kept and label not in self.left_out}
        self._clear()
        return taken

    def leave_out(self, label: str, error: Exception) -> None:
        """Stop watching a layer, and warn once with the reason."""
        if label not in self.left_out:
            self.left_out[label] = str(error)
            rank_zero_warn(f"a layer is no longer watched: {error}")

    def _clear(self) -> None:
        super()._clear()
        for kept in self._kept.values():
            kept.clear()

    def _see(self, label: str, value: Any, module: nn.Module, args: Any, kwargs: Any) -> None:
        if label in self.left_out:
            return
        try:
            super()._see(label, value, module, args, kwargs)
        except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
            self.leave_out(label, error)

    def _remember(self, label: str, call: LayerCall) -> None:
        with torch.no_grad():
            embeddings = self._rows.of(call, self._layouts[label], label)
            self._kept[label].append(embeddings.detach().clone())
