"""Thresholds on singular values as parametrizations of weights: a learned one per layer, and ranks with a gradient."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lightning_plugins._checks import check_finite_number, check_positive_int
from lightning_plugins.compression._layers import select_layers
from lightning_plugins.compression._parametrizations import clean_modules, put_on, take_off
from lightning_plugins.compression.masks import bake_masks, masks_of, remove_masks
from lightning_plugins.functional.spectrum import at_least_float32, decompose, finite_or_zero, full_precision

NAME = "rank_thresholds"


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
        self._steps: list[_Thresholded] = []  # in a list: they are submodules of the layers

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
            Scalars by layer; the weights' part of the gradient is there in the steps in which they are decomposed.
        """
        ranks = {}
        for index, name in enumerate(self.layers):
            spectrum = self._steps[index].spectrum()
            largest = spectrum.detach().amax().clamp_min(torch.finfo(spectrum.dtype).tiny)
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


class _Basis(NamedTuple):
    """Left singular vectors of a wide matrix, ``(m, m)``, its singular values in rising order, and 0 or NaN."""

    vectors: Tensor
    values: Tensor
    poison: Tensor


def apply_thresholds(
    model: nn.Module,
    layers: str | Sequence[str] = "*",
    *,
    beta: float = 1.0,
    init: float = 0.0,
    refresh_every: int = 1,
) -> RankThresholds:
    """Lower the singular values of weights by a learned threshold, from now on.

    A weight, masked where there are masks (which must be put on first), acts as ``U diag(max(s - tau, 0)) V.T``, the
    matrix of scheme 1: exactly low-rank at every moment. The singular vectors and values come from one decomposition
    of the smaller Gram matrix, and the backward is a closed form that needs no other.

    A decomposition is kept as long as neither weight nor mask change: it serves all batches that are accumulated. With
    ``refresh_every=k`` it also serves the ``k - 1`` optimizer steps behind: their forward multiplies the weight by the
    same matrix ``U diag(max(1 - tau / s, 0)) U.T``, and what flows through that matrix to weight and threshold is left
    out of their backward, and counted ``k`` times where the matrix is computed.

    Args:
        model: The model, changed in place: the thresholds are parameters of its submodule ``rank_thresholds``.
        layers: Linear layers and convolutions without groups: a dotted name, a glob, or a sequence of them.
        beta: The inverse temperature of the soft ranks to begin with.
        init: The thresholds to begin with, as a share of the largest singular value.
        refresh_every: In how many optimizer steps every weight is decomposed once; 1 gives the exact gradient always.

    Returns:
        The thresholds.

    Raises:
        ValueError: If no layer fits, the model has thresholds already, or a number is outside of its range.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[4.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
        >>> thresholds = apply_thresholds(net, init=0.5)
        >>> net[0].weight.detach(), thresholds.hard_ranks()
        (tensor([[2., 0., 0.],
                [0., 0., 0.]]), {'0': 1})

    Source:
        Eo et al., https://arxiv.org/abs/2309.13077: our reading. The form of the gradient is ours.
    """
    if check_finite_number("beta", beta) <= 0:
        raise ValueError(f"`beta` must be positive, got {beta!r}")
    if check_finite_number("init", init) < 0:
        raise ValueError(f"`init` must be at least 0, got {init!r}")
    check_positive_int("refresh_every", refresh_every)
    if thresholds_of(model) is not None:
        raise ValueError("`model` must have no thresholds yet; take the old ones off with `remove_thresholds`")
    plain = model
    if masks_of(model) is not None:
        plain = copy.deepcopy(model)
        remove_masks(plain)
    chosen = [name for name, layer in select_layers(plain, layers).items() if min(layer.weight.flatten(1).shape) > 1]
    if not chosen:
        raise ValueError(f"`layers`: {layers!r} must match a weight with two rows and columns or more, got none")
    modules = clean_modules(model)
    with torch.no_grad():
        largest = [torch.linalg.matrix_norm(at_least_float32(_weight(modules[name]).flatten(1)), 2) for name in chosen]
    scales = torch.stack(largest).clamp_min(torch.finfo(torch.float32).tiny)
    thresholds = RankThresholds(chosen, scales, beta=beta, init=init, refresh_every=refresh_every)
    model.add_module(NAME, thresholds)
    for index, name in enumerate(chosen):
        step = _Thresholded(thresholds, index, modules[name])
        thresholds._steps.append(step)
        put_on(modules[name], "weight", step)
    return thresholds


def thresholds_of(model: nn.Module) -> RankThresholds | None:
    """The thresholds of a model.

    Args:
        model: The model.

    Returns:
        The thresholds that `apply_thresholds` put on, or None.
    """
    thresholds = model._modules.get(NAME)
    return thresholds if isinstance(thresholds, RankThresholds) else None


def remove_thresholds(model: nn.Module) -> None:
    """Take the thresholds off: the model is what it was, with the same parameters in the same order.

    Args:
        model: The model.

    Raises:
        ValueError: If it has no thresholds.
    """
    if thresholds_of(model) is None:
        raise ValueError("`model` must have thresholds to take off, got none; `apply_thresholds` puts them on")
    for module in list(model.modules()):
        take_off(module, _Thresholded, bake=False)
    del model._modules[NAME]


def bake(model: nn.Module) -> None:
    """Write hard masks and thresholds into the weights, and take both off; the parameters stay the same objects.

    Args:
        model: The model.

    Raises:
        ValueError: If it has neither masks nor thresholds.
    """
    masks, thresholds = masks_of(model), thresholds_of(model)
    if thresholds is None:
        bake_masks(model)
        return
    if masks is not None:
        masks.set_hard()
    modules = clean_modules(model)
    with torch.no_grad():
        lowered = {}
        for step, name in zip(thresholds._steps, thresholds.layers, strict=True):
            step.decompose_anew()
            lowered[name] = _weight(modules[name]).clone()
    remove_thresholds(model)
    if masks is not None:
        bake_masks(model)
    with torch.no_grad():
        for name, weight in lowered.items():
            _weight(modules[name]).copy_(weight)


def _weight(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]  # of layers that have one
    return weight


class _Thresholded(nn.Module):
    """Lower the singular values of a weight."""

    def __init__(self, thresholds: RankThresholds, index: int, layer: nn.Module) -> None:
        super().__init__()
        self._thresholds = (thresholds,)  # in tuples, so that they are not submodules here
        self._layer = (layer,)
        self.index = index
        self._basis: _Basis | None = None
        self._key: Any = None
        self._age = 0  # optimizer steps since the decomposition
        self._fresh = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # what is kept between calls cannot be traced
    def forward(self, weight: Tensor) -> Tensor:
        (thresholds,) = self._thresholds
        if thresholds.bypass:
            return weight
        with full_precision(weight):
            wide, turned = _wide(at_least_float32(weight).flatten(1))
            basis, through = self._current(wide)
            tau = thresholds.tau(self.index).to(wide.dtype)
            lowered: Tensor = _Lower.apply(wide, tau, *basis, through)
            return (lowered.mT if turned else lowered).reshape(weight.shape).to(weight.dtype)

    def spectrum(self) -> Tensor:
        """The singular values in rising order, with gradient in the steps in which they are computed."""
        basis, held = self._basis, self._thresholds[0].refresh_every > 1
        if basis is not None and held and not self._fresh and self._versions() == self._key:
            return basis.values
        weight = self._before()
        with full_precision(weight):
            wide, _ = _wide(at_least_float32(weight).flatten(1))
            basis, through = self._current(wide)
            values: Tensor = _Values.apply(wide, *basis[:2], through) if through else basis.values
            return values

    def decompose_anew(self) -> Tensor:
        """Decompose the weight as it is; the singular values in rising order."""
        weight = self._before().detach()
        with full_precision(weight):
            wide, _ = _wide(at_least_float32(weight).flatten(1))
            self._basis, self._age, self._fresh, self._key = _decompose(wide), 0, True, self._versions()
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
            self._basis = _Basis(*(part.to(self._steps().original.device) for part in basis))

    def _before(self) -> Tensor:
        """The weight that reaches this step."""
        steps = self._steps()
        weight: Tensor = steps.original
        for step in steps:
            if step is self:
                return weight
            weight = step(weight)
        return weight

    def _versions(self) -> Any:
        """What changes when the weight that reaches this step does."""
        steps = self._steps()
        others = [step.versions() for step in steps if step is not self and hasattr(step, "versions")]
        return [steps.original.data_ptr(), steps.original._version, *others]

    def _steps(self) -> Any:
        layer: Any = self._layer[0]
        return layer.parametrizations["weight"]

    def _current(self, wide: Tensor) -> tuple[_Basis, int]:
        """The decomposition to use, and how often the gradient through it counts."""
        every = self._thresholds[0].refresh_every
        key = self._versions()
        basis = self._basis
        if basis is None or (key != self._key and (self.training or every == 1)):
            self._age += 1
            self._fresh = basis is None or self._age >= every
            if basis is None or self._fresh:
                basis, self._age = _decompose(wide.detach()), 0
            self._basis, self._key = basis, key
        return basis, every if self._fresh else 0


def _wide(matrix: Tensor) -> tuple[Tensor, bool]:
    turned = matrix.shape[0] > matrix.shape[1]
    return (matrix.mT if turned else matrix), turned


def _decompose(wide: Tensor) -> _Basis:
    with torch.no_grad():
        gram, poison = finite_or_zero(wide @ wide.mT)
        squares, vectors = decompose(gram, vectors=True)
        return _Basis(vectors, squares.clamp_min(0).sqrt(), poison)


def _safe(values: Tensor) -> Tensor:
    """Singular values to divide by: below the root of the rounding error of the Gram matrix they are noise."""
    least = torch.finfo(values.dtype).eps ** 0.5 * values.amax()
    return torch.maximum(values, least).clamp_min(torch.finfo(values.dtype).tiny ** 0.25)


def _factors(values: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """What singular values are multiplied by, and which are above the threshold; without threshold all are."""
    kept = (values > tau) | (tau <= 0)
    return torch.where(kept, 1 - tau / torch.where(kept & (tau > 0), values, 1), 0), kept


class _Lower(Function):
    """``Q @ W`` with ``Q = U diag(max(1 - tau / s, 0)) U.T`` from a decomposition of ``W @ W.T``."""

    @staticmethod
    def forward(
        ctx: Any, wide: Tensor, tau: Tensor, vectors: Tensor, values: Tensor, poison: Tensor, through: int
    ) -> Tensor:
        factors, _ = _factors(values, tau)
        matrix = (vectors * (factors + poison)) @ vectors.mT
        ctx.save_for_backward(wide, tau, vectors, values, matrix)
        ctx.through = through
        return matrix @ wide

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wide, tau, vectors, values, matrix = ctx.saved_tensors
        none = (None, None, None, None)
        with full_precision(wide):
            of_wide = matrix @ grad
            if not ctx.through:
                return of_wide, None, *none
            safe, (_, kept) = _safe(values), _factors(values, tau)
            turned = vectors.mT @ (grad @ wide.mT) @ vectors
            of_tau = -ctx.through * torch.where(kept, turned.diagonal() / safe, 0).sum()
            core = ctx.through * _slopes(safe, tau, kept) * (turned + turned.mT)
            return of_wide.addmm_(vectors @ core @ vectors.mT, wide), of_tau, *none


class _Values(Function):
    """The singular values of a decomposition of ``W @ W.T`` as a function of ``W``."""

    @staticmethod
    def forward(ctx: Any, wide: Tensor, vectors: Tensor, values: Tensor, through: int) -> Tensor:
        ctx.save_for_backward(wide, vectors, values)
        ctx.through = through
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wide, vectors, values = ctx.saved_tensors
        with full_precision(wide):
            return ((vectors * (ctx.through * grad / _safe(values))) @ vectors.mT) @ wide, None, None, None


def _slopes(values: Tensor, tau: Tensor, kept: Tensor) -> Tensor:
    """``(q_i - q_j) / (s_i ** 2 - s_j ** 2)`` with ``q = max(1 - tau / s, 0)``, without differences that cancel."""
    one, other = values[:, None], values[None, :]
    both = kept[:, None] & kept[None, :]
    high, low = torch.maximum(one, other), torch.minimum(one, other)
    above = tau / (one * other * (one + other))
    # The lower value is at most the threshold, so that the quotient of the differences is at most 1.
    across = (high - tau).clamp_min(0) / (high - torch.minimum(low, tau)).clamp_min(torch.finfo(high.dtype).tiny)
    across = across / (high * (high + low))
    return torch.where(both, above, torch.where(kept[:, None] ^ kept[None, :], across, 0))
