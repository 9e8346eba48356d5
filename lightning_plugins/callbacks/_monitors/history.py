"""The spectra that a monitor remembers."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_plugins.callbacks._monitors.loaders import shown_stage
from lightning_plugins.plots import spectrum_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SpectrumHistory:
    """Spectra by stage, layer and training step: the first, the latest and, between them, steps as even as can be.

    Args:
        max_spectra: So many are kept of every layer in every stage.
        stages: Names of the stages.
    """

    def __init__(self, max_spectra: int, stages: tuple[str, ...]) -> None:
        self._max_spectra = max_spectra
        self._stages = stages
        self.kept: dict[str, dict[str, dict[int, Tensor]]] = {}
        self.clear()

    def clear(self) -> None:
        """Forget all spectra."""
        self.kept = {stage: {} for stage in self._stages}

    def remember(self, stage: str, label: str, step: int, spectrum: Tensor) -> None:
        """Keep the spectrum of a step, in place of an earlier one of the same step."""
        kept = self.kept.setdefault(stage, {}).setdefault(label, {})
        if any(len(other) != len(spectrum) for other in kept.values()):
            kept.clear()  # the layer was replaced by one of another width
        kept[step] = spectrum
        if len(kept) > self._max_spectra:
            steps = sorted(kept)
            inner = range(1, len(steps) - 1)
            crowded = min(inner, key=lambda i: steps[i + 1] - steps[i - 1], default=0)
            del kept[steps[crowded]]

    def figure(self, stage: str, label: str) -> "Figure":
        """Draw the spectra of one layer over the steps.

        Args:
            stage: The stage.
            label: The layer.

        Returns:
            The figure.
        """
        steps, spectra = self.sorted_by_step(stage, label)
        return spectrum_figure(spectra, steps, title=f"{label} in {shown_stage(stage)}")

    def sorted_by_step(self, stage: str, label: str) -> tuple[list[int], list[Tensor]]:
        """Steps and spectra of one layer, for a figure.

        Returns:
            The steps in ascending order, and their spectra.
        """
        steps = sorted(self.kept[stage][label])
        return steps, [self.kept[stage][label][step] for step in steps]

    def state(self) -> dict[str, Any]:
        """The spectra as lists, tensors and numbers."""
        return {
            stage: {label: {"steps": list(kept), "spectra": list(kept.values())} for label, kept in layers.items()}
            for stage, layers in self.kept.items()
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from the spectra in ``state``."""
        self.kept = {
            stage: {label: dict(zip(kept["steps"], kept["spectra"], strict=True)) for label, kept in layers.items()}
            for stage, layers in state.items()
        }
