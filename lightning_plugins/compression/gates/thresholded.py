"""The parametrization by which a threshold acts on a weight."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.compression.gates import followed_bases
from lightning_plugins.compression.gates.masked_weight import Masked
from lightning_plugins.compression.gates.threshold_function import (
    Basis,
    Lower,
    Lowering,
    Values,
    decompose_wide,
    lowering,
    wide_view,
)
from lightning_plugins.functional.spectrum import at_least_float32, full_precision

_REMEMBERED = ("_basis", "_exact", "_key", "_current_at_load", "_age", "_tau", "_tau_key", "_lowering")


class Thresholded(nn.Module):
    """Lower the singular values of a weight, and scale its rows first if the mask before it is deferred.

    A decomposition is exact, or on an accelerator follows the one before together with those of other layers.
    """

    def __init__(self, thresholds: Any, index: int, layer: nn.Module) -> None:
        super().__init__()
        self._thresholds = (thresholds,)  # in tuples, so that they are not submodules here
        self._layer = (layer,)
        self.index = index
        self._basis: Basis | None = None
        self._exact = False  # whether it is a decomposition of its own
        self._key: Any = None
        self._current_at_load = False
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
            scale = self._scale(wide)
            basis = self._current(wide, scale)
            age = max(self._age, self._key != self._versions())  # a change outside of training makes it old, too
            matrices, value = self._matrices(basis, age > 0), thresholds.values[self.index]
            lowered: Tensor = Lower.apply(wide, scale, value, basis, matrices, age, thresholds.refresh_every)
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
        if self._basis is None or not self._exact or self._age or self._versions() != self._key:
            weight = self._before().detach()
            with torch.no_grad(), full_precision(weight):
                wide, _ = wide_view(at_least_float32(weight))
                return self._renew(wide, self._scale(wide)).values
        return self._basis.values

    def state(self) -> dict[str, Any]:
        """The decomposition, its age, whether it is that of the present weight, and the threshold in use."""
        basis = None if self._basis is None else list(self._basis)
        current = self._basis is not None and self._key == self._versions()
        return {"age": self._age, "basis": basis, "tau": self._tau, "current": current, "exact": self._exact}

    def load(self, state: dict[str, Any] | None) -> None:
        """Take over a decomposition.

        The next forward in training counts as that of another step, unless it was one of the weight as it was saved.
        """
        self._key = self._basis = self._lowering = self._tau = None
        self._current_at_load = False
        if state and state["basis"]:
            device = self.steps().original.device
            self._age = int(state["age"])
            self._basis = Basis(*(part.to(device) for part in state["basis"]))
            self._tau = None if state["tau"] is None else state["tau"].to(device)
            self._exact = bool(state.get("exact", True))
            self._current_at_load = bool(state.get("current", False)) and followed_bases.follows(self._basis.values)

    def set_aside(self) -> dict[str, Any]:
        """Forget what belongs to the present weight; returns it, for `take_back`."""
        remembered = {name: vars(self)[name] for name in _REMEMBERED}
        self._key = self._basis = self._lowering = self._tau = self._tau_key = None
        self._exact, self._current_at_load, self._age = False, False, 0
        return remembered

    def take_back(self, remembered: dict[str, Any]) -> None:
        """Go on from what `set_aside` returned, once the weight has its values of then."""
        vars(self).update(remembered)

    @property
    def basis(self) -> Basis | None:
        """The decomposition in use."""
        return self._basis

    def threshold(self) -> tuple[Tensor, Tensor]:
        """The threshold and its unit."""
        (thresholds,) = self._thresholds
        return thresholds.values[self.index].detach(), thresholds.scales[self.index]

    def _before(self) -> Tensor:
        """The weight that reaches this step."""
        steps = self.steps()
        weight: Tensor = steps.original
        for step in steps:
            if step is self:
                return weight
            weight = step(weight)
        return weight

    def _deferred(self) -> Masked | None:
        """The mask that this parametrization applies as well."""
        return next((step for step in self.steps() if isinstance(step, Masked) and step.deferred), None)

    def _scale(self, wide: Tensor) -> Tensor | None:
        """Return the factors of the rows before they are lowered."""
        mask = self._deferred()
        return None if mask is None else mask.row_scale().to(wide.dtype)

    def _versions(self) -> Any:
        """Return a key that changes when the weight that reaches this step does."""
        steps = self.steps()
        others = [step.versions() for step in steps if step is not self and hasattr(step, "versions")]
        return [steps.original.data_ptr(), steps.original._version, *others]

    def steps(self) -> Any:
        """Return the parametrizations of the weight, with its original."""
        layer: Any = self._layer[0]
        return layer.parametrizations["weight"]

    def _current(self, wide: Tensor, scale: Tensor | None) -> Basis:
        """The decomposition to use; that of the matrix that is handed over if it is time for it."""
        key = self._versions()
        if self._basis is None:
            return self._renew(wide, scale)
        if self._is_due(key):
            if not followed_bases.follows(wide):
                return self._renew(wide, scale)
            steps = [step for step in self._thresholds[0]._steps if step is self or step._is_due(step._versions())]
            for step, basis in zip(steps, followed_bases.follow_together(steps), strict=True):
                step._take(basis, exact=False)
        elif self._counts(key):
            self._age, self._key = self._age + 1, key
        return self._basis

    def _counts(self, key: Any) -> bool:
        """Return whether this is a use in another optimizer step."""
        if self._key is None and self._current_at_load:
            self._key = key
        return key != self._key and (self.training or self._thresholds[0].refresh_every == 1)

    def _is_due(self, key: Any) -> bool:
        return self._basis is not None and self._counts(key) and self._age + 1 >= self._thresholds[0].refresh_every

    def _renew(self, wide: Tensor, scale: Tensor | None) -> Basis:
        return self._take(decompose_wide(wide.detach(), None if scale is None else scale.detach()), exact=True)

    def _take(self, basis: Basis, *, exact: bool) -> Basis:
        self._basis, self._exact = basis, exact
        self._age, self._key = 0, self._versions()
        self._lowering = self._tau = None
        return basis

    def _matrices(self, basis: Basis, held: bool) -> Lowering:
        """Return the matrices that multiply the weight. Where it is held, so is the threshold."""
        key = self.threshold_key()
        if self._lowering is None and not self._exact and followed_bases.follows(basis.values):
            steps = [step for step in self._thresholds[0]._steps if step.waits()]
            for step, lowered in zip(steps, followed_bases.lower_together(steps), strict=True):
                step._lowering, step._tau, step._tau_key = lowered, lowered.tau, step.threshold_key()
        if self._lowering is None or (key != self._tau_key and not held):
            (thresholds,) = self._thresholds
            if self._tau is None or not held:
                self._tau = thresholds.tau(self.index).detach().to(basis.values.dtype, copy=True)
            unit = thresholds.scales[self.index].to(basis.values.dtype)
            self._lowering, self._tau_key = lowering(basis, self._tau, unit), key
        return self._lowering

    def waits(self) -> bool:
        """Return whether there is a basis that was found with those of other layers, and no matrices yet."""
        return self._basis is not None and not self._exact and self._lowering is None

    def held_level(self) -> Tensor | None:
        """The threshold in the unit of singular values, if it is that of an earlier step."""
        return self._tau if self._age or self._key != self._versions() else None

    def threshold_key(self) -> Any:
        """Return a key that changes when the threshold does."""
        value = self._thresholds[0].values[self.index]
        return value.data_ptr(), value._version
