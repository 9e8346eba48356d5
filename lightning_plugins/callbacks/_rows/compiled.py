"""Find compiled code in a module: graphs do not look again for hooks that are put on later."""

from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule


def is_compiled(model: nn.Module) -> bool:
    """Tell whether a model, a module in it, or a function that one of them holds, goes through `torch.compile`."""
    if getattr(model, "_compiler_ctx", None) is not None:  # a LightningModule that was compiled as a whole
        return True
    return any(map(_compiled, model.modules()))


def _compiled(module: nn.Module) -> bool:
    if isinstance(module, OptimizedModule) or module._compiled_call_impl is not None:
        return True
    own: list[Any] = list(vars(module).values())
    for kind in type(module).__mro__:
        if kind is nn.Module:
            break
        own.extend(vars(kind).values())
    return any(hasattr(value, "_torchdynamo_orig_callable") for value in own if callable(value))
