"""The parametrization that applies a mask to a weight, with a gradient that saves passes over the weight."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function


class Masked(nn.Module):
    """Scale the slices of a parameter by the masks of the groups they belong to.

    Attributes:
        deferred: Whether the next parametrization applies them instead.
    """

    def __init__(
        self, masks: Any, parts: Sequence[tuple[int, int, tuple[int, ...]]], owner: nn.Module, name: str
    ) -> None:
        super().__init__()
        self.deferred = False
        # In lists, so that they are no submodules here: their parameters count once.
        self._masks, self._owner, self._name = [masks], [owner], name
        self.dims = tuple(dict.fromkeys(dim for dim, _, _ in parts))
        self.parts = tuple((dim, index) for dim, index, _ in parts)
        for number, (_, _, units) in enumerate(parts):
            plain = units == tuple(range(len(units)))
            at = None if plain else torch.tensor(units)
            self.register_buffer(f"units_{number}", at, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the masked weight, or the weight itself where a threshold applies the mask later."""
        return weight if self.deferred else self.scaled(weight)

    def scaled(self, weight: Tensor) -> Tensor:
        """The weight times the masks."""
        if torch.compiler.is_compiling():  # what is kept between calls cannot be traced
            scales = self._own_scales()
        else:
            answer = self._masks[0].shared.answer(self._masks[0], self, weight)
            if answer.product is not None and answer.source is weight:
                product: Tensor = answer.product
                return product
            # A vector that is not the module's own parameter, as in `torch.func.functional_call`, is multiplied here.
            scales = answer.scales or self._own_scales()
        for dim, scale in scales.items():
            weight = _Scaled.apply(weight, scale.to(weight.dtype), dim)
        return weight

    def row_scale(self) -> Tensor:
        """Return the factors of the rows."""
        if torch.compiler.is_compiling():
            return self._own_scales()[0]
        scale: Tensor = self._masks[0].shared.answer(self._masks[0], self, None).scales[0]
        return scale

    def values(self) -> dict[int, Tensor]:
        """Return the factors by dimension without gradients, before they are used in the forward pass."""
        found: dict[int, Tensor] = self._masks[0].shared.values(self._masks[0], self)
        return found

    def source(self) -> Tensor:
        """Return the parameter that is masked, without any parametrization."""
        found: Tensor = self._steps().original
        return found

    def multiplies_a_vector(self) -> bool:
        """Return whether a parameter that is a vector comes here as it is."""
        steps = self._steps()
        return bool(steps.original.ndim == 1 and steps[0] is self)

    def groups_of(self, dim: int) -> list[tuple[int, Tensor]]:
        """Numbers of groups, and for every entry of a dimension its unit, or -1.

        Args:
            dim: The dimension.

        Returns:
            Pairs; units are on the CPU.
        """
        size = self.source().shape[dim]
        found = []
        for number, (own, index) in enumerate(self.parts):
            if own == dim:
                units = getattr(self, f"units_{number}")
                found.append((index, torch.arange(size) if units is None else units.cpu()))
        return found

    def _steps(self) -> Any:
        owner: Any = self._owner[0]
        return owner.parametrizations[self._name]

    def _own_scales(self) -> dict[int, Tensor]:
        (masks,) = self._masks
        scales: dict[int, Tensor] = {}
        for number, (dim, index) in enumerate(self.parts):
            mask = masks.mask(index)
            units = getattr(self, f"units_{number}")
            if units is not None:
                mask = torch.cat([mask, mask.new_ones(1)])[units]  # -1, the last: not of this group
            scales[dim] = scales[dim] * mask if dim in scales else mask
        return scales

    def versions(self) -> tuple[object, ...]:
        """Return a key that changes when the masks do."""
        (masks,) = self._masks
        scores = [masks.scores[index]._version for _, index in self.parts]
        noise = id(masks._noise) if masks._noise and masks.training else None
        return (*scores, masks.beta._version, masks.hard._version, noise)


def scale_at_once(model: nn.Module) -> None:
    """Let every mask be applied by its own parametrization again."""
    for module in model.modules():
        if isinstance(module, Masked):
            module.deferred = False


class _Scaled(Function):
    """``weight`` times a vector along one dimension; the backward allocates one tensor of the weight's size."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.dim = dim
        return weight * _along(scale, weight.ndim, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        weight, scale = ctx.saved_tensors
        along = _along(scale, grad.ndim, ctx.dim)
        if not ctx.needs_input_grad[1]:  # hard masks
            return grad * along, None, None
        if torch.is_grad_enabled():  # differentiated again: nothing may be written into a tensor of the graph
            others = [i for i in range(grad.ndim) if i != ctx.dim]
            return grad * along, (grad * weight).sum(others) if others else grad * weight, None
        product = grad * weight
        of_scale = product.sum([i for i in range(grad.ndim) if i != ctx.dim]) if grad.ndim > 1 else product.clone()
        return torch.mul(grad, along, out=product), of_scale, None


def _along(scale: Tensor, ndim: int, dim: int) -> Tensor:
    return scale.reshape([-1 if i == dim else 1 for i in range(ndim)])
