"""The thresholds of a model as a module, and the step that one of them is on the way to a weight."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_finite_number
from lightning_plugins.compression._threshold_function import Basis, Lower, Values, decompose_wide, wide_view
from lightning_plugins.functional.spectrum import at_least_float32, full_precision


class RankThresholds(nn.Module):
    """The thresholds of all layers of a model, and the ranks they leave. Made by `apply_thresholds`.

    Attributes:
        layers: The names of the layers.
        values: For each layer the threshold as a share of the largest singular value that its weight had when the
            thresholds were put on; a scalar of at least 0.
        beta: The inverse temperature of the soft ranks, a buffer.
        refresh_every: In how many optimizer steps every weight is decomposed once.
    """

    beta: Tensor
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

    def forward(self, x: Any) -> Any:
        """Hand on what comes in: in a model that is an ``nn.Sequential`` this module is its last.

        Args:
            x: Anything.

        Returns:
            The same.
        """
        return x

    def set_beta(self, beta: float) -> None:
        """Set the inverse temperature of the soft ranks.

        Args:
            beta: A positive number.

        Raises:
            ValueError: If it is not positive.
        """
        if check_finite_number("beta", beta) <= 0:
            raise ValueError(f"`beta` must be positive, got {beta!r}")
        self.beta.fill_(beta)

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
        """How far every singular value is above the threshold, as shares of the largest, in falling order."""
        found = {}
        with torch.no_grad():
            for index, name in enumerate(self.layers):
                spectrum = self._steps[index].decompose_anew()
                largest = spectrum.amax().clamp_min(torch.finfo(spectrum.dtype).tiny)
                found[name] = ((spectrum - self.tau(index)) / largest).flip(0)
        return found

    def hard_ranks(self) -> dict[str, int]:
        """The numbers of singular values above the thresholds, at least 1."""
        return {name: max(1, int((margin > 0).sum())) for name, margin in self.margins().items()}

    def get_extra_state(self) -> dict[str, Any]:
        """The decompositions in use and their ages, so that a resumed run goes on with them."""
        return {str(i): step.state() for i, step in enumerate(self._steps)} if self.refresh_every > 1 else {}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over decompositions.

        Args:
            state: From `get_extra_state`.
        """
        for index, step in enumerate(self._steps):
            step.load(state.get(str(index)))


class Thresholded(nn.Module):
    """Lower the singular values of a weight."""

    def __init__(self, thresholds: RankThresholds, index: int, layer: nn.Module) -> None:
        super().__init__()
        self._thresholds = (thresholds,)  # in tuples, so that they are not submodules here
        self._layer = (layer,)
        self.index = index
        self._basis: Basis | None = None
        self._key: Any = None
        self._age = 0  # optimizer steps since the decomposition

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # what is kept between calls cannot be traced
    def forward(self, weight: Tensor) -> Tensor:
        (thresholds,) = self._thresholds
        if thresholds.bypass:
            return weight
        with full_precision(weight):
            wide, restore = wide_view(at_least_float32(weight))
            tau = thresholds.tau(self.index).to(wide.dtype)
            lowered: Tensor = Lower.apply(wide, tau, *self._current(lambda: wide))
            return restore(lowered).to(weight.dtype)

    def spectrum(self) -> Tensor:
        """The singular values in rising order, with gradient."""
        basis = self._basis
        if basis is not None and not torch.is_grad_enabled() and self._versions() == self._key:
            return basis.values
        scale = self._row_scale()
        weight = self._before() if scale is None else self._steps().original
        with full_precision(weight):
            wide, _ = wide_view(at_least_float32(weight))
            if scale is None:
                values: Tensor = Values.apply(wide, None, *self._current(lambda: wide)[:2])
                return values
            mask = scale.to(wide.dtype)
            vectors, values, _ = self._current(lambda: wide * mask[:, None])
            # Of d(s_i) = u_i.T dW v_i the part of a row's mask m_r is s_i u_ri ** 2 / m_r: no pass over the weight.
            slopes = torch.where(mask[:, None] == 0, 0, vectors.square() * values / mask[:, None]).detach()
            of_weight: Tensor = Values.apply(wide, mask.detach(), vectors, values)
            return of_weight + (mask - mask.detach()) @ slopes

    def decompose_anew(self) -> Tensor:
        """Decompose the weight as it is, unless that is done; the singular values in rising order."""
        key = self._versions()
        if self._basis is None or self._age or key != self._key:
            weight = self._before().detach()
            with full_precision(weight):
                wide, _ = wide_view(at_least_float32(weight))
                self._basis, self._age, self._key = decompose_wide(wide), 0, key
        return self._basis.values

    def state(self) -> dict[str, Any]:
        """The decomposition and its age."""
        return {"age": self._age, "basis": None if self._basis is None else list(self._basis)}

    def load(self, state: dict[str, Any] | None) -> None:
        """Take over a decomposition; the next forward in training counts as that of another step."""
        basis = state and state["basis"]
        self._key, self._basis = None, None
        if state and basis:
            self._age = int(state["age"])
            self._basis = Basis(*(part.to(self._steps().original.device) for part in basis))

    def _before(self) -> Tensor:
        """The weight that reaches this step."""
        steps = self._steps()
        weight: Tensor = steps.original
        for step in steps:
            if step is self:
                return weight
            weight = step(weight)
        return weight

    def _row_scale(self) -> Tensor | None:
        """The mask that reaches this step, where it scales rows that are no more than the columns."""
        steps = self._steps()
        rows, columns = steps.original.flatten(1).shape
        if len(steps) != 2 or steps[1] is not self or rows > columns:
            return None
        scale: Tensor | None = steps[0].row_scale() if hasattr(steps[0], "row_scale") else None
        return scale

    def _versions(self) -> Any:
        """What changes when the weight that reaches this step does."""
        steps = self._steps()
        others = [step.versions() for step in steps if step is not self and hasattr(step, "versions")]
        return [steps.original.data_ptr(), steps.original._version, *others]

    def _steps(self) -> Any:
        layer: Any = self._layer[0]
        return layer.parametrizations["weight"]

    def _current(self, wide: Callable[[], Tensor]) -> Basis:
        """The decomposition to use; that of the matrix that is handed over if it is time for it."""
        every = self._thresholds[0].refresh_every
        key = self._versions()
        basis = self._basis
        if basis is None or (key != self._key and (self.training or every == 1)):
            self._age += 1
            if basis is None or self._age >= every:
                basis, self._age = decompose_wide(wide().detach()), 0
            self._basis, self._key = basis, key
        return basis
