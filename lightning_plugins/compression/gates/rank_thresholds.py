"""The thresholds of a model as a module, and the parametrization by which one acts on a weight."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.compression.gates.annealed import Annealed
from lightning_plugins.compression.gates.masked_weight import Masked
from lightning_plugins.compression.gates.threshold_function import (
    Basis,
    Lower,
    Lowering,
    Values,
    decompose_wide,
    lowering,
    wide_view,
    without_noise,
)
from lightning_plugins.functional.spectrum import at_least_float32, full_precision


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

    def get_extra_state(self) -> dict[str, Any]:
        """The decompositions in use and their ages, for resuming."""
        return {str(i): step.state() for i, step in enumerate(self._steps)} if self.refresh_every > 1 else {}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over decompositions.

        Args:
            state: From `get_extra_state`.
        """
        for index, step in enumerate(self._steps):
            step.load(state.get(str(index)))


class Thresholded(nn.Module):
    """Lower the singular values of a weight, and scale its rows first if the mask before it is deferred."""

    def __init__(self, thresholds: RankThresholds, index: int, layer: nn.Module) -> None:
        super().__init__()
        self._thresholds = (thresholds,)  # in tuples, so that they are not submodules here
        self._layer = (layer,)
        self.index = index
        self._basis: Basis | None = None
        self._key: Any = None
        self._age = 0  # optimizer steps since the decomposition
        self._tau: Tensor | None = None  # the threshold in `_lowering`, which may be that of an earlier step
        self._tau_key: Any = None
        self._lowering: Lowering | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # state kept between calls cannot be traced
    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with its singular values lowered by the threshold."""
        (thresholds,) = self._thresholds
        mask = self._deferred()
        if thresholds.bypass:
            return weight if mask is None else mask.scaled(weight)
        with full_precision(weight):
            wide, restore = wide_view(at_least_float32(weight))
            tau, scale = thresholds.tau(self.index).to(wide.dtype), self._scale(wide)
            basis = self._current(wide, scale)
            age = max(self._age, self._key != self._versions())  # a change outside of training makes it old, too
            matrices = self._matrices(basis, tau, age > 0)
            lowered: Tensor = Lower.apply(wide, scale, tau, basis, matrices, age, thresholds.refresh_every)
            return restore(lowered).to(weight.dtype)

    def spectrum(self) -> Tensor:
        """The singular values in rising order, with gradient."""
        basis = self._basis
        if basis is not None and not torch.is_grad_enabled() and self._versions() == self._key:
            return basis.values
        weight = self._before()
        with full_precision(weight):
            wide, _ = wide_view(at_least_float32(weight))
            scale = self._scale(wide)
            vectors, values, _ = self._current(wide, scale)
            of_weight: Tensor = Values.apply(wide, None if scale is None else scale.detach(), vectors, values)
            if scale is None:
                return of_weight
            # Of d(s_i) = u_i.T dM v_i the part of a row's mask m_r is s_i u_ri ** 2 / m_r: no pass over the weight.
            fixed = scale.detach()
            relative = (scale - fixed) / torch.where(fixed == 0, torch.inf, fixed)
            return of_weight + (relative @ vectors.square()) * values

    def decompose_anew(self) -> Tensor:
        """Decompose the weight as it is, unless that is done; the singular values in rising order."""
        if self._basis is None or self._age or self._versions() != self._key:
            weight = self._before().detach()
            with torch.no_grad(), full_precision(weight):
                wide, _ = wide_view(at_least_float32(weight))
                return self._renew(wide, self._scale(wide)).values
        return self._basis.values

    def state(self) -> dict[str, Any]:
        """The decomposition, its age, and the threshold in use."""
        return {"age": self._age, "basis": None if self._basis is None else list(self._basis), "tau": self._tau}

    def load(self, state: dict[str, Any] | None) -> None:
        """Take over a decomposition; the next forward in training counts as that of another step."""
        self._key = self._basis = self._lowering = self._tau = None
        if state and state["basis"]:
            device = self._steps().original.device
            self._age = int(state["age"])
            self._basis = Basis(*(part.to(device) for part in state["basis"]))
            self._tau = None if state["tau"] is None else state["tau"].to(device)

    def _before(self) -> Tensor:
        """The weight that reaches this step."""
        steps = self._steps()
        weight: Tensor = steps.original
        for step in steps:
            if step is self:
                return weight
            weight = step(weight)
        return weight

    def _deferred(self) -> Masked | None:
        """The mask that this parametrization applies as well."""
        return next((step for step in self._steps() if isinstance(step, Masked) and step.deferred), None)

    def _scale(self, wide: Tensor) -> Tensor | None:
        """Return the factors of the rows before they are lowered."""
        mask = self._deferred()
        return None if mask is None else mask.row_scale().to(wide.dtype)

    def _versions(self) -> Any:
        """Return a key that changes when the weight that reaches this step does."""
        steps = self._steps()
        others = [step.versions() for step in steps if step is not self and hasattr(step, "versions")]
        return [steps.original.data_ptr(), steps.original._version, *others]

    def _steps(self) -> Any:
        layer: Any = self._layer[0]
        return layer.parametrizations["weight"]

    def _current(self, wide: Tensor, scale: Tensor | None) -> Basis:
        """The decomposition to use; that of the matrix that is handed over if it is time for it."""
        every = self._thresholds[0].refresh_every
        key = self._versions()
        if self._basis is None:
            return self._renew(wide, scale)
        if key != self._key and (self.training or every == 1):
            self._age += 1
            if self._age >= every:
                return self._renew(wide, scale)
            self._key = key
        return self._basis

    def _renew(self, wide: Tensor, scale: Tensor | None) -> Basis:
        self._basis = decompose_wide(wide.detach(), None if scale is None else scale.detach())
        self._age, self._key = 0, self._versions()
        self._lowering = self._tau = None
        return self._basis

    def _matrices(self, basis: Basis, tau: Tensor, held: bool) -> Lowering:
        """Return the matrices that multiply the weight. Where it is held, so is the threshold."""
        value = self._thresholds[0].values[self.index]
        key = (value.data_ptr(), value._version)
        if self._lowering is None or (key != self._tau_key and not held):
            if self._tau is None or not held:
                self._tau = tau.detach().clone()
            self._lowering, self._tau_key = lowering(basis, self._tau), key
        return self._lowering


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
