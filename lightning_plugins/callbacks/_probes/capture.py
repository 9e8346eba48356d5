"""Forward hooks that copy what layers gave, for callbacks that only look at it."""

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_plugins.callbacks._rows.capture import LayerRows
from lightning_plugins.callbacks._rows.masks import LayerCall
from lightning_plugins.callbacks._rows.readout import Readout


class CopyingCapture(LayerRows):
    """The tensors of named layers, copied without a gradient: what comes after may change them in place.

    A layer that does not run is left out.
    """

    def __init__(self, model: nn.Module, layers: str | Sequence[str], *, needs_gradient: bool = False) -> None:
        super().__init__(model, layers, Readout(), needs_gradient=needs_gradient)
        self._tensors: dict[str, list[Tensor]] = {label: [] for label in self.labels}

    @property
    def names(self) -> list[str]:
        """Clean names of the layers, without sides."""
        return [reference.name for reference in self._references.values()]

    def take(self) -> dict[str, list[Tensor]]:
        """Return the recorded tensors.

        Returns:
            One tensor for each call, of the layers that were called.
        """
        taken = {label: list(tensors) for label, tensors in self._tensors.items() if tensors}
        self._clear()
        return taken

    def _clear(self) -> None:
        super()._clear()
        for tensors in self._tensors.values():
            tensors.clear()

    def _remember(self, label: str, call: LayerCall) -> None:
        self._tensors[label].append(call.features.detach().clone())
