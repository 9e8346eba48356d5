"""Networks that a method would explain wrongly, or not at all, and its layer, checked on a sample."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins._lightning import MisconfigurationException

GUIDED = ("guided_backprop", "guided_gradcam")
HOOKED = (*GUIDED, "deeplift", "deeplift_shap", "lrp")  # which see the modules of a network, not its functions


def check_logits(network: nn.Module, inputs: Tensor) -> None:
    """Raise an error for a network that does not return logits.

    Args:
        network: The network.
        inputs: Some inputs of it.

    Raises:
        MisconfigurationException: If it returns no tensor of logits.
    """
    with torch.no_grad():
        found = network(inputs)
    if not isinstance(found, Tensor) or found.ndim != 2:
        got = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise MisconfigurationException(
            f"`network` must map inputs to logits of shape (n, classes), got {got} from {type(network).__name__}; name"
            " the submodule that does, or wrap it in one"
        )


def check_network(name: str, network: nn.Module, inputs: Tensor) -> None:
    """Raise an error for networks that a method would silently explain wrongly.

    Guided backpropagation, DeepLIFT and LRP put hooks on modules. They do not see a function such as ``F.relu``, and a
    module that is called twice, or writes over its input, mixes up what they store.

    Args:
        name: Name of the method.
        network: The network.
        inputs: Some inputs of it.

    Raises:
        MisconfigurationException: If the method has no module to hook, or one that it cannot.
    """
    if name not in HOOKED:
        return
    relus = [(path, module) for path, module in network.named_modules() if isinstance(module, nn.ReLU)]
    names: dict[nn.Module, str] = {module: path for path, module in relus}
    if inplace := [path for path, module in relus if module.inplace]:
        raise MisconfigurationException(
            f"{name} cannot hook ReLUs that write over their input, got {_some(inplace)}; set `inplace = False` on"
            " each, as in `for module in model.modules(): ...`"
        )
    calls: dict[nn.Module, int] = dict.fromkeys(names, 0)

    def count(module: nn.Module, *_: Any) -> None:
        calls[module] += 1

    handles = [module.register_forward_hook(count) for module in names]
    try:
        with torch.no_grad(), _Relus() as seen:
            network(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if shared := [names[module] for module, times in calls.items() if times > 1]:
        raise MisconfigurationException(
            f"{name} needs a separate ReLU at every place, got {_some(shared)} called several times in a forward"
            " pass; build one `nn.ReLU()` for each"
        )
    if seen.count > sum(calls.values()):
        raise MisconfigurationException(
            f"{name} only sees ReLU modules, got {seen.count - sum(calls.values())} ReLU(s) called as functions, "
            "such as `F.relu(x)`; build `nn.ReLU()` modules"
        )
    if name in GUIDED and not calls:
        raise MisconfigurationException(f"{name} changes the gradient of ReLUs, and {type(network).__name__} has none")


def check_layer(name: str, network: nn.Module, layer: nn.Module, inputs: Tensor) -> None:
    """Raise an error for a layer whose output has no positions, such as one after pooling.

    Args:
        name: What the method is called by the user.
        network: The network.
        layer: One of its modules.
        inputs: Some inputs of it, of shape ``(n, C, *spatial)``.

    Raises:
        MisconfigurationException: If its output has another number of dimensions, or it is not run.
    """
    seen: list[object] = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        with torch.no_grad():
            network(inputs)
    finally:
        handle.remove()
    shapes = [tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__ for one in seen]
    space = inputs.ndim > 2
    if not (space and seen and all(isinstance(one, Tensor) and one.ndim == inputs.ndim for one in seen)):
        raise MisconfigurationException(
            f"`methods[{name!r}]['layer']` must be a layer whose output has the positions of the inputs, which are"
            f" {tuple(inputs.shape)}, got {shapes or 'one that is not run'}; take the last one before the pooling"
        )


class _Relus(torch.overrides.TorchFunctionMode):
    """Counts calls of the ReLU, as a function or through its module."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in {F.relu, torch.relu, torch.Tensor.relu, torch.relu_, torch.Tensor.relu_}
        with torch._C.DisableTorchFunction():  # `F.relu` calls `torch.relu`: one call, counted once
            return func(*args, **(kwargs or {}))


def _some(names: list[str]) -> str:
    return f"{names[:3]}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
