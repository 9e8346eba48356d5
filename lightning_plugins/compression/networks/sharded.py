"""Networks whose parameters FSDP2 shares out over processes: copied whole, and made whole in place."""

from typing import Any

from torch import nn

from lightning_plugins.distributed import full_tensor

# Where torch keeps the state of `fully_shard` in a module; the one private name of torch that a surgery depends on.
_STATE = "__composable_api"
_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


def is_sharded(network: nn.Module) -> bool:
    """Return whether parameters of a network are shared out over processes, or were gathered for a forward pass."""
    shared_out = any(hasattr(parameter, "full_tensor") for parameter in network.parameters())
    return shared_out or any(is_group(module) for module in network.modules())


def is_group(module: nn.Module) -> bool:
    """Return whether ``fully_shard`` was applied to a module itself."""
    return type(module).__mro__[1].__name__ == "FSDPModule"


def class_before_sharding(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before ``fully_shard``, which puts one of its own before it."""
    kind: type[nn.Module] = type(module)
    return kind.__mro__[2] if is_group(module) else kind


def whole_copy(module: Any) -> Any:
    """Copy a module that FSDP2 shards, which refuses to be copied, with whole tensors; all processes call.

    Attributes that are neither tensors nor modules are those of the original.

    Returns:
        The copy, without hooks, of the class that the module had before.
    """
    kind = class_before_sharding(module)
    state = module.__getstate__() if hasattr(module, "_trainer") else vars(module)  # without the Trainer
    made: nn.Module = kind.__new__(kind)
    vars(made).update({**state, **vars(nn.Module())})  # without hooks
    for name, tensor in module._parameters.items():
        made._parameters[name] = None if tensor is None else nn.Parameter(full_tensor(tensor.detach()).clone())
    for name, tensor in module._buffers.items():
        made._buffers[name] = None if tensor is None else full_tensor(tensor).clone()
    made._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
    for name, child in module._modules.items():
        made._modules[name] = None if child is None else whole_copy(child)
    return made


def make_whole(network: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """Take sharding off a network, in place; all processes call.

    Modules that were sharded themselves are replaced by others with the same contents, since torch shards a module only
    once.

    Args:
        network: The network, whose outermost module is not sharded itself.

    Returns:
        The whole parameters by those that were sharded.
    """
    modules = list(network.modules())
    for module in modules:
        if is_group(module):
            module.reshard()  # type: ignore[operator]  # of torch's FSDPModule
    plain = {module: _without_sharding(module) for module in modules}
    wholes: dict[nn.Parameter, nn.Parameter] = {}
    for module in plain.values():
        for name, child in module._modules.items():
            module._modules[name] = None if child is None else plain[child]
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in wholes:
                    whole = full_tensor(parameter.detach()).clone()
                    wholes[parameter] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
                module._parameters[name] = wholes[parameter]
    return wholes


def _without_sharding(module: nn.Module) -> nn.Module:
    """Return the module without torch's hooks; another object with the same contents if it was sharded itself."""
    for name in _HOOKS:
        hooks: dict[int, Any] = vars(module)[name]
        for key in [key for key, hook in hooks.items() if _is_torchs(hook)]:
            del hooks[key]
    if not is_group(module):
        return module
    kind = class_before_sharding(module)
    made: nn.Module = kind.__new__(kind)
    vars(made).update({name: value for name, value in vars(module).items() if not name.startswith(_STATE)})
    return made


def _is_torchs(hook: Any) -> bool:
    function = getattr(hook, "hook", hook)  # torch wraps some
    return str(getattr(function, "__module__", "")).startswith("torch.distributed")
