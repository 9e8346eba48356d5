"""Forward hooks that copy what layers gave, for callbacks that only look at it."""

from typing import Any

from torch import Tensor

from lightning_plugins.callbacks._terms.capture import LayerCapture, first_tensor


class CopyingCapture(LayerCapture):
    """The tensors of named layers, copied without a gradient: what comes after may change them in place.

    A layer that does not run is left out.
    """

    @property
    def labels(self) -> list[str]:
        """All layers, whether they run or not, in the same order in every process."""
        return list(self._references)

    @property
    def names(self) -> list[str]:
        """Clean names of the layers, without sides."""
        return [reference.name for reference in self._references.values()]

    def take(self) -> dict[str, list[Tensor]]:
        """Hand over what was recorded.

        Returns:
            One tensor for each call, of the layers that were called.
        """
        taken = {label: list(tensors) for label, tensors in self._tensors.items() if tensors}
        self._clear()
        return taken

    def _remember(self, label: str, value: Any) -> None:
        self._tensors[label].append(first_tensor(value, label).detach().clone())
