"""Functions of torch that an inner loop computes in another way, for derivatives that are right or exist."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch.func import vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_plugins.meta.loop import norms
from lightning_plugins.meta.loop.embeddings import embedding

_Function = Callable[..., Any]
_Result = TypeVar("_Result")


class Replaced(TorchFunctionMode):
    """Calls other functions in place of torch's while it is entered.

    Args:
        replacements: By the function that is replaced.
    """

    def __init__(self, replacements: Mapping[_Function, _Function]) -> None:
        super().__init__()
        self.replacements = replacements

    def __torch_function__(
        self,
        func: _Function,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the replacement, if there is one."""
        return self.replacements.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Keep transformers from their fused inference, which has no derivative.

    In evaluation mode `nn.TransformerEncoderLayer` takes it where nothing seems to require a gradient, as under
    `torch.func.grad`.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def replaced(vectorize: bool, device: torch.device, *, twice: bool = False) -> Iterator[None]:
    """For a forward pass whose gradient is right, or ``twice`` differentiable.

    The second derivative needs other norms, and attention in elementary operations, whatever the user or the model
    chose: its fused kernels have none. Under `vmap` that of the CPU has no first one either that is fast. What holds
    outside of this context is as before behind it.
    """
    table: dict[_Function, _Function] = {F.embedding: embedding}
    with ExitStack() as contexts:
        if twice or (vectorize and device.type == "cpu"):
            table |= _ATTENTION
            contexts.enter_context(sdpa_kernel(SDPBackend.MATH))
        if vectorize and (twice or _autocast()):  # the backward of torch's norms mixes dtypes under `vmap` and autocast
            table |= norms.VECTORIZED
        elif twice:
            table |= norms.LOOPED
        contexts.enter_context(Replaced(table))
        yield


def with_autocast(call: Callable[[], _Result]) -> _Result:
    """Call under `vmap`, where torch heeds autocast inside of a `grad` transform alone."""
    if not _autocast():
        return call()
    results: _Result = vjp(lambda _: call(), torch.zeros(()))[0]
    return results


def _autocast() -> bool:
    return any(map(torch.is_autocast_enabled, ("cpu", "cuda")))


def _in_elementary_operations(attention: _Function, *args: Any, **kwargs: Any) -> Any:
    with sdpa_kernel(SDPBackend.MATH):
        return attention(*args, **kwargs)


_ATTENTION: dict[_Function, _Function] = {
    function: partial(_in_elementary_operations, function)
    for function in (F.scaled_dot_product_attention, F.multi_head_attention_forward)
}
