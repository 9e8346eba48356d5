"""Find layers that can be split in two, and say why others cannot."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_plugins.compression.low_rank.transposed import is_transposed
from lightning_plugins.compression.low_rank.weight_readers import readers
from lightning_plugins.compression.networks.quantized import is_quantized
from lightning_plugins.selection import select_modules
from lightning_plugins.weights import Scheme, check_scheme

Layer = nn.Linear | nn.Conv1d | nn.Conv2d

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d)
_SAME = {("timm.layers.linear", "Linear")}  # its own forward pass differs from torch's under TorchScript only
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def select_layers(
    model: nn.Module, layers: str | Sequence[str], *, scheme: Scheme = 1, transposed: bool = False
) -> dict[str, Layer]:
    """Find the layers that can be split in two.

    Args:
        model: The model.
        layers: A dotted name, a glob over dotted names, or a sequence of them. Globs skip layers that cannot be split.
        scheme: How a kernel becomes a matrix; scheme 2 needs convolutions in two dimensions.
        transposed: Whether the ``Conv1D`` of transformers counts as a linear layer.

    Returns:
        Layers by clean dotted name, in the model's order; a shared layer is there once, under its first name.

    Raises:
        ValueError: If nothing is found, or a layer that is named exactly cannot be split.
        TypeError: If ``layers`` is neither a string nor a sequence of strings.

    Example:
        >>> net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> list(select_layers(net, "*"))
        ['1', '3']
    """
    check_scheme(scheme)
    matched = select_modules(model, layers)
    patterns = [layers] if isinstance(layers, str) else list(layers)
    named = {id(model.get_submodule(pattern)) for pattern in patterns if _has(model, pattern)}  # the others are globs
    standing, found, passed = _reasons_in(model), {}, []
    for name, module in matched.items():
        if is_quantized(module._parameters.get("weight")):  # asking for all layers includes these
            raise ValueError(f"`layers`: {name!r} is quantised; compress first and quantise last")
        reason = reason_against(module, scheme=scheme, transposed=transposed) or standing.get(module)
        if reason is None:
            found[name] = cast("Layer", module)
        elif id(module) in named or name in patterns:  # by name; a wrapped layer answers to its wrapper's
            raise ValueError(f"`layers`: {name!r} must be a layer that can be split in two, but it {reason}")
        else:
            passed.append(f"{name!r} {reason}")
    if not found:
        few = "; ".join(passed[:3]) + (f"; and {len(passed) - 3} more" if len(passed) > 3 else "")
        raise ValueError(
            f"`layers`: {layers!r} must match linear layers or convolutions that can be split in two, but {few}"
        )
    return found


def reason_against(module: nn.Module, *, scheme: Scheme = 1, transposed: bool = True) -> str | None:
    """Why a module cannot be split in two, whatever stands around it.

    Args:
        module: Any module.
        scheme: How a kernel becomes a matrix.
        transposed: As for `select_layers`.

    Returns:
        The reason, as the end of a sentence, or None.

    Example:
        >>> reason_against(nn.Conv2d(4, 4, 3, groups=2))
        'has 2 groups, and only convolutions with `groups=1` can be; leave it dense'
    """
    kind = type(module).__name__
    if transposed and is_transposed(module):
        return _reason_of_parameter(module) or _reason_of_weight(cast("Layer", module))
    if not isinstance(module, _PLAIN):
        if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            return f"is a {kind}; name a layer in it, or take all of them with a glob such as 'name.*'"
        return f"is a {kind}, and only Linear, Conv1d and Conv2d can be; leave it dense"
    own = next(base for base in _PLAIN if isinstance(module, base))
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) or is_lazy(module.weight):
        return "is lazy and has no shape yet; run a batch through the model first"
    if _overrides(module, own):
        whose = f"{type(module).__module__}.{kind}"  # it may be called as torch's class is
        return f"is a {whose}, which may compute in its own way what a {own.__name__} computes; leave it dense"
    if reason := _reason_of_parameter(module):
        return reason
    if not isinstance(module, nn.Linear) and module.groups > 1:
        return f"has {module.groups} groups, and only convolutions with `groups=1` can be; leave it dense"
    if scheme == 2 and isinstance(module, nn.Conv1d):
        return "is a Conv1d, and `scheme=2` needs two dimensions; pass `scheme=1`"
    return _reason_of_weight(module)


def _reason_of_parameter(module: nn.Module) -> str | None:
    if "weight" in module._parameters and not nn.utils.parametrize.is_parametrized(module):
        return None
    return (
        "has a weight that is computed from others (a parametrization, weight or spectral norm, pruning); "
        "make it a parameter first, as with `torch.nn.utils.parametrize.remove_parametrizations`"
    )


def _reason_of_weight(module: Layer) -> str | None:
    if is_quantized(module.weight):
        return "is quantised; compress first and quantise last"
    if not module.weight.is_floating_point():
        return f"has a weight in {module.weight.dtype}; factorise before quantising"
    if hasattr(module.weight, "full_tensor"):
        return "has a weight that is sharded over processes; factorise before sharding"
    if min(module.weight.shape) < 1:
        return f"has an empty weight of shape {tuple(module.weight.shape)}; leave it dense"
    return None


def _overrides(module: Layer, own: type[nn.Module]) -> bool:
    """Return whether the module's forward pass is another than that of torch's class."""
    methods = ["forward", "__call__", *(["_conv_forward"] if own is not nn.Linear else [])]
    replaced = any(method in vars(module) for method in methods)
    if (type(module).__module__, type(module).__name__) in _SAME:
        return replaced
    return replaced or any(getattr(type(module), method) is not getattr(own, method) for method in methods)


def _reasons_in(model: nn.Module) -> dict[nn.Module, str]:
    """The reasons why layers of this model cannot be split."""
    reasons = {
        layer: f"has a weight that is also read elsewhere ({what}); leave it dense"
        for layer, what in readers(model).items()
    }
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for module in model.modules():
        if any(uses[id(p)] > 1 for p in module._parameters.values()):
            reasons[module] = "shares a parameter with another module (tied weights); untie them, or leave it dense"
        elif any(getattr(module, hooks) for hooks in _HOOKS):
            reasons[module] = "has hooks, which would be lost; remove them first, or leave it dense"
        if isinstance(module, nn.MultiheadAttention):
            reasons[module.out_proj] = "is never called: its MultiheadAttention reads the weight; leave it dense"
        if isinstance(module, torch._dynamo.OptimizedModule):
            reasons[module._orig_mod] = "is compiled on its own; compile the model as a whole, or after this"
        for first, second in _pairs(module):
            reasons[first] = reasons[second] = "is already a factor of a low-rank layer; leave it unchanged"
    return reasons


def _pairs(module: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """The two layers of a sequence such as `low_rank_layer` makes."""
    if type(module) is not nn.Sequential or len(module) != 2:
        return []
    return [(first, second) for first, second in pairwise(module) if is_low_rank_pair(first, second)]


def is_low_rank_pair(first: nn.Module, second: nn.Module) -> bool:
    """Return whether two consecutive layers are a low-rank form of one.

    Args:
        first: The first layer.
        second: The second layer.

    Returns:
        Whether they are two plain layers of one kind, the first without bias and no wider than the second's output
        and its own input.

    Example:
        >>> is_low_rank_pair(nn.Linear(8, 2, bias=False), nn.Linear(2, 8))
        True
    """
    if type(first) is not type(second) or type(first) not in _PLAIN:
        return False
    A, B = first._parameters.get("weight"), second._parameters.get("weight")
    if A is None or B is None or first.bias is not None or A.shape[0] != B.shape[1]:
        return False
    scheme_1 = all(size == 1 for size in B.shape[2:])
    scheme_2 = A.ndim == 4 and A.shape[2] == B.shape[3] == 1
    return (scheme_1 or scheme_2) and A.shape[0] <= min(A[0].numel(), B.shape[0] * B[0, 0].numel())


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Exchange modules at all places of a model at which they stand.

    Args:
        model: The model, changed in place.
        replacements: New modules by old.

    Example:
        >>> net = nn.Sequential(nn.ReLU())
        >>> replace_modules(net, {net[0]: nn.Tanh()})
        >>> net
        Sequential(
          (0): Tanh()
        )
    """
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[key] = replacements[child]


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return bool(name)
