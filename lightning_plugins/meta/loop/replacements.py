"""Replacements of torch functions in an inner loop whose derivatives are missing or wrong."""

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
    """Calls replacements of torch functions while active.

    Args:
        replacements: The replacements by original function.
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
        """Call the replacement, if any."""
        return self.replacements.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Disable the fused inference path of transformers, which has no derivative.

    In evaluation mode `nn.TransformerEncoderLayer` uses it if nothing seems to require a gradient, as under
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
    """Context for a forward pass that is correctly differentiable once, or ``twice``.

    The second derivative needs replaced norms, and attention in elementary operations, whatever the user or the model
    selected: fused kernels have none. Under `vmap` the CPU kernel has no fast first derivative either. Settings are
    restored on exit.
    """
    table: dict[_Function, _Function] = {F.embedding: embedding}
    with ExitStack() as contexts:
        if twice or (vectorize and device.type == "cpu"):
            table |= _ATTENTION
            contexts.enter_context(sdpa_kernel(SDPBackend.MATH))
        if vectorize and (twice or _autocast()):  # backward of torch's norms mixes dtypes under `vmap` and autocast
            table |= norms.VECTORIZED
        elif twice:
            table |= norms.LOOPED
        contexts.enter_context(Replaced(table))
        yield


def with_autocast(call: Callable[[], _Result]) -> _Result:
    """Call under `vmap`, where torch applies autocast only inside a `grad` transform."""
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
