"""Weights in eight bits, of any network and after any compression."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from lightning_plugins.compression.low_rank.splittable import replace_modules
from lightning_plugins.compression.low_rank.transposed import as_linear, is_transposed
from lightning_plugins.compression.networks.arguments import check_module
from lightning_plugins.compression.networks.quantized import is_quantized
from lightning_plugins.compression.structure.restore_structure import restore_structure
from lightning_plugins.compression.structure.state_keys import align, clean, named_modules, shapes_of, values_in
from lightning_plugins.selection import select_modules

M = TypeVar("M", bound=nn.Module)


def quantize(model: M, layers: str | Sequence[str] = "*") -> M:
    """Store the weights of linear layers as int8 with one scale for each output, in place, through torchao.

    It comes last: first train, compress (`factorize`, `shrink`, the callbacks) and fine-tune, then quantise. What is
    quantised takes no gradient and is refused by everything here that makes a network smaller. The halves of low-rank
    layers are linear layers like others, and a ``Conv1D`` of transformers, as in GPT-2, becomes an `nn.Linear`.
    Convolutions, embeddings and norms stay as they are, as do layers with one input, weights that are tied to others,
    and what `nn.MultiheadAttention` reads without calling it. Activations stay floating: weights are dequantised as a
    layer runs, so memory and files shrink, but time only with `torch.compile` or on devices with such kernels.

    Args:
        model: The network; a module that holds the layers.
        layers: Dotted name of a layer, a glob over names, or several of them.

    Returns:
        ``model``, whose state dict `load_quantized` loads.

    Raises:
        ImportError: If torchao is not installed.
        TypeError: If ``model`` is not a module.
        ValueError: If no linear layer is found, one is quantised already, or has a weight that is not finite.

    Example:
        >>> import torch
        >>> net = quantize(nn.Sequential(nn.Linear(32, 16)))
        >>> net(torch.ones(2, 32)).shape
        torch.Size([2, 16])
    """
    check_module(model)
    functions = _torchao()
    chosen: set[nn.Module] = set()
    linear: dict[nn.Module, nn.Module] = {}  # in place of each `Conv1D`
    kept = {module.out_proj for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    uses = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    types: set[type[nn.Module]] = {nn.Linear, *(type(module) for module in model.modules() if is_transposed(module))}
    for name, layer in select_modules(model, layers, types=list(types)).items():
        weight = layer._parameters.get("weight")
        if is_quantized(weight):
            raise ValueError(f"`model` must not be quantised twice, but {name!r} is; quantise once, as the last step")
        if weight is None or layer in kept:
            continue
        form = as_linear(layer)
        # Of a single input a weight and its scale would take more than the weight alone.
        if type(form) is not nn.Linear or form.in_features == 1:
            continue
        if uses[id(weight)] > 1:  # in integers it would no longer be the one of the embedding
            continue
        if not bool(weight.isfinite().all()):
            raise ValueError(f"`model`: the weight of {name!r} must be finite, got NaN or infinite entries")
        chosen.add(form)
        if form is not layer:
            form.weight = nn.Parameter(form.weight.detach().contiguous(), requires_grad=False)
            linear[layer] = form
    if not chosen:
        raise ValueError(f"`layers`: {layers!r} must match linear layers of torch whose weights are parameters")
    replace_modules(model, linear)
    functions.quantize_(
        model, functions.Int8WeightOnlyConfig(set_inductor_config=False), filter_fn=lambda layer, _: layer in chosen
    )
    return model


def load_quantized(model: M, state_dict: Mapping[str, Any]) -> M:
    """Load the state dict of a network that was compressed, quantised, or both.

    Args:
        model: The network as its constructor makes it: dense and not quantised.
        state_dict: What ``state_dict()`` of the small network returned. From a file: ``torch.load(path)``, behind
            ``import torchao``, which tells torch that its tensors are safe.

    Returns:
        ``model``, with the structure and the very tensors of the small network.

    Raises:
        ImportError: If torchao is not installed.
        TypeError: If ``state_dict`` is not a mapping.
        ValueError: If it is not one of this network.

    Example:
        >>> import torch
        >>> small = quantize(nn.Sequential(nn.Linear(32, 16)))
        >>> again = load_quantized(nn.Sequential(nn.Linear(32, 16)), small.state_dict())
        >>> torch.equal(again(torch.ones(2, 32)), small(torch.ones(2, 32)))
        True
    """
    _torchao()
    values = values_in(state_dict)
    _untranspose(model, values)
    restore_structure(model, values)
    model.load_state_dict(values, assign=True)
    for parameter in model.parameters():
        if is_quantized(parameter):
            parameter.requires_grad_(False)
    return model


def _untranspose(model: nn.Module, values: Mapping[str, Any]) -> None:
    """Put the linear layers in place that `quantize` made of a network's ``Conv1D``."""
    integers = {clean(name): value for name, value in values.items() if is_quantized(value)}
    names = align(integers, shapes_of(model))
    layers = {module for name, module in named_modules(model) if is_transposed(module) and f"{name}.weight" in names}
    replace_modules(model, {layer: as_linear(layer) for layer in layers})


def _torchao() -> Any:
    try:
        import torchao.quantization
    except ImportError as error:
        raise ImportError(
            "weights in eight bits need torchao: `pip install 'lightning-plugins[quantization]'`"
        ) from error
    return torchao.quantization
