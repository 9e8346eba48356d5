"""The singular values of all layers in one table."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_plugins.compression.gates.threshold_function import noise_of


class SpectrumTable:
    """Singular values of layers as rows of a table, without those that are rounding errors.

    Args:
        spectra: For every layer its singular values in rising order, all of one dtype and device.

    Attributes:
        largest: The largest of every layer.
    """

    def __init__(self, spectra: Sequence[Tensor]) -> None:
        # Infinite values, which no threshold passes, fill the rows of smaller layers.
        table = spectra[0].new_full((len(spectra), max(map(len, spectra))), torch.inf)
        torch._foreach_copy_([row[: len(values)] for row, values in zip(table, spectra, strict=True)], list(spectra))
        self.largest = torch.stack([values[-1] for values in spectra])
        self._table = torch.where(table > noise_of(self.largest)[:, None], table, 0)

    def below(self, thresholds: Tensor) -> Tensor:
        """Count the singular values that are not above thresholds.

        Args:
            thresholds: For every layer several, of shape ``(layers, n)``.

        Returns:
            The numbers, of the same shape.
        """
        return torch.searchsorted(self._table, thresholds.to(self._table), right=True)
