"""A scalar whose gradient is already computed for everything it depends on."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_plugins.functional.derivatives import refuse_derivatives
from lightning_plugins.functional.spectrum import full_precision


class Sources:
    """Finds the leaves that values depend on from the autograd graph, and accumulates their gradients.

    An explicit list of parameters would miss tensors that the model, the loss or a preconditioner closes over.
    """

    def __init__(self) -> None:
        self._gradients: dict[Tensor, Tensor] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []  # of a chunk's inputs that require a gradient
        self._begin = _sequence_number()

    def inputs(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The inputs of a chunk as leaves: tensors they were computed from get their gradient later."""
        copies = tuple(tensor.detach().requires_grad_() if tensor.requires_grad else tensor for tensor in tensors)
        self._copies = [pair for pair in zip(copies, tensors, strict=True) if pair[1].requires_grad]
        return copies

    def add(self, value: Tensor) -> None:
        """Add the gradient of ``value`` and free its graph."""
        if not value.requires_grad:
            return
        found, shared = _leaves_of(value, self._begin)
        # A graph created before the call, such as that of `scale.exp()` in a loss, is shared by all chunks.
        with full_precision(value):
            gradients = torch.autograd.grad(value, found, allow_unused=True, retain_graph=shared)
        originals = {id(copy): original for copy, original in self._copies}
        for leaf, gradient in zip(found, gradients, strict=True):
            source = originals.get(id(leaf), leaf)
            if gradient is None:
                continue
            before = self._gradients.get(source)
            self._gradients[source] = gradient if before is None else before + gradient

    def known(self) -> tuple[list[Tensor], list[Tensor]]:
        """The sources and their gradients."""
        return list(self._gradients), list(self._gradients.values())


def with_known_gradient(value: Tensor, sources: Sources) -> Tensor:
    """Attach known gradients to a scalar."""
    tensors, gradients = sources.known()
    result: Tensor = _KnownGradient.apply(value, tuple(gradients), *tensors)
    return result


def _leaves_of(value: Tensor, begin: int) -> tuple[list[Tensor], bool]:
    """The leaves in the graph of a value, and whether it has other nodes older than ``begin``."""
    if value.grad_fn is None:
        return [value], False
    found, shared = [], False
    waiting, seen = [value.grad_fn], {value.grad_fn}
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            found.append(node.variable)
            continue
        shared = shared or node._sequence_nr() < begin
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found, shared


def _sequence_number() -> int:
    """The sequence number of a new node: older nodes of this thread have smaller ones."""
    with torch.enable_grad():
        made = torch.zeros((), requires_grad=True) + 0
    return int(made.grad_fn._sequence_nr())  # type: ignore[union-attr]  # an addition with gradients enabled


class _KnownGradient(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], *sources: Tensor) -> Tensor:
        ctx.known = gradients
        ctx.save_for_backward(*sources)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            scaled = tuple(grad.to(known.dtype) * known for known in ctx.known)
        sources = (grad, *ctx.saved_tensors)
        return None, None, *refuse_derivatives(scaled, sources, "the loss of an inner loop with `chunk_size`")
