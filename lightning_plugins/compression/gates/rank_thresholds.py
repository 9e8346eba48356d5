"""The thresholds of a model as a module, and the ranks they leave."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.compression.gates import followed_bases
from lightning_plugins.compression.gates.annealed import Annealed
from lightning_plugins.compression.gates.masked_weight import Masked
from lightning_plugins.compression.gates.threshold_function import without_noise
from lightning_plugins.compression.gates.thresholded import Thresholded
from lightning_plugins.functional.spectrum import at_least_float32


class RankThresholds(Annealed):
    """The thresholds of all layers of a model, and the ranks they leave. Made by `apply_thresholds`.

    Attributes:
        layers: The names of the layers.
        values: For each layer the threshold as a share of the largest singular value that its weight had when the
            thresholds were put on; a scalar of at least 0.
        beta: The inverse temperature of the soft ranks, a buffer.
        refresh_every: In how many optimizer steps every weight is decomposed once.
    """

    scales: Tensor

    def __init__(self, layers: Sequence[str], scales: Tensor, *, beta: float, init: float, refresh_every: int) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.values = nn.ParameterList(nn.Parameter(scales.new_tensor(float(init))) for _ in layers)
        self.register_buffer("scales", scales)
        self.register_buffer("beta", scales.new_tensor(float(beta)))
        self.refresh_every = refresh_every
        self.bypass = False
        self._steps: list[Thresholded] = []  # in a list: they are submodules of the layers

    @torch.no_grad()
    def measure(self) -> None:
        """Set the unit of the thresholds to the current largest singular values, while the thresholds are bypassed."""
        layers: list[Any] = [step._layer[0] for step in self._steps]
        self.scales.copy_(largest_singular_values([layer.weight for layer in layers]))

    def clamp_(self) -> None:
        """Raise negative thresholds to 0; after every optimizer step."""
        with torch.no_grad():
            for value in self.values:
                value.clamp_(min=0)

    def tau(self, index: int) -> Tensor:
        """The threshold of one layer in the unit of its singular values. A negative one counts as 0, and can grow.

        Args:
            index: The layer's number.

        Returns:
            Scalar.
        """
        value: Tensor = self.values[index]
        return (value + (value.clamp_min(0) - value).detach()) * self.scales[index]

    def soft_ranks(self) -> dict[str, Tensor]:
        """``sum(sigmoid(beta * (s - tau) / s_1))`` for every layer, with gradient to threshold and weight.

        Returns:
            Scalars by layer.
        """
        ranks = {}
        for index, name in enumerate(self.layers):
            spectrum = self._steps[index].spectrum()
            largest = spectrum.detach().amax().clamp_min(torch.finfo(spectrum.dtype).tiny ** 0.25)  # to divide twice by
            ranks[name] = torch.sigmoid(self.beta * (spectrum - self.tau(index)) / largest).sum()
        return ranks

    def margins(self) -> dict[str, Tensor]:
        """Return the margin of every singular value over the threshold, as shares of the largest, in falling order."""
        found = {}
        with torch.no_grad():
            for index, name in enumerate(self.layers):
                spectrum = self._steps[index].decompose_anew()
                largest = spectrum.amax().clamp_min(torch.finfo(spectrum.dtype).tiny)
                found[name] = ((without_noise(spectrum) - self.tau(index)) / largest).flip(0)
        return found

    def hard_ranks(self) -> dict[str, int]:
        """The numbers of singular values above the thresholds, at least 1."""
        return {name: max(1, int((margin > 0).sum())) for name, margin in self.margins().items()}

    def set_aside(self) -> Callable[[], None]:
        """Forget the decompositions, because weights get other values for a while.

        Returns:
            A function to call when they have their values of now again, after which computations go on as if they had
            always had them.
        """
        remembered = [(step, step.set_aside()) for step in self._steps]

        def take_back() -> None:
            for step, own in remembered:
                step.take_back(own)

        return take_back

    def get_extra_state(self) -> dict[str, Any]:
        """The decompositions in use and their ages, for resuming; where every step makes exact ones, nothing."""
        if self.refresh_every == 1 and not followed_bases.follows(self.scales):
            return {}
        return {str(i): step.state() for i, step in enumerate(self._steps)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over decompositions.

        Args:
            state: From `get_extra_state`.
        """
        for index, step in enumerate(self._steps):
            step.load(state.get(str(index)))


def largest_singular_values(weights: Sequence[Tensor]) -> Tensor:
    """Spectral norms of weights as matrices, clamped above zero."""
    largest = [torch.linalg.matrix_norm(at_least_float32(weight.flatten(1)), 2) for weight in weights]
    return torch.stack(largest).clamp_min(torch.finfo(torch.float32).tiny)


def defer_row_mask(layer: nn.Module) -> None:
    """Let the last parametrization of a layer's weight apply the mask right before it, where it can."""
    steps: Any = layer.parametrizations["weight"]  # type: ignore[index]
    rows, columns = steps.original.flatten(1).shape
    mask = steps[-2] if len(steps) > 1 else None
    if isinstance(mask, Masked) and mask.dims == (0,) and rows <= columns:
        mask.deferred = True
