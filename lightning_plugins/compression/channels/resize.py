"""Layers with fewer channels: their tensors, and the attributes that say how large these are."""

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_plugins.compression.low_rank.transposed import is_transposed

_HEADS = ("num_heads", "num_attention_heads", "n_heads")
_ALL_HEADS = (  # sizes that are heads times something
    *("attn_dim", "key_attn_dim", "val_attn_dim", "all_head_size"),
    *("num_key_value_heads", "num_kv_heads", "split_size", "inner_dim"),
)
_PROJECTIONS = (
    *("qkv", "c_attn", "q", "qk", "query", "q_proj", "q_lin", "wq"),
    *("kv", "k", "key", "k_proj", "k_lin", "wk"),
    *("v", "value", "v_proj", "v_lin", "wv"),
)


def resize_layer(layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a layer tensors of other shapes, and set its sizes to them: channels, features, groups.

    A depthwise convolution (as many groups as input channels) loses a group with every channel; the groups of another
    grouped convolution stay, and each has fewer channels. Of a layer of a kind that is not known here the tensors are
    exchanged and nothing else.

    Args:
        layer: The layer, changed in place. Its own parameters and buffers only, not those of modules in it.
        tensors: New values by the name of the parameter or buffer (``"weight"``, ``"running_mean"``). A parameter stays
            trainable or frozen as it was, becomes a new object, contiguous in memory, and has no gradient.

    Raises:
        ValueError: If the layer has no such tensor, or the sizes do not fit its kind.

    Example:
        >>> conv = nn.Conv2d(8, 8, 3, groups=8)
        >>> resize_layer(conv, {"weight": conv.weight[:5].detach(), "bias": conv.bias[:5].detach()})
        >>> conv
        Conv2d(5, 5, kernel_size=(3, 3), stride=(1, 1), groups=5)
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if reason := why_not(layer, shapes):
        raise ValueError(f"`tensors` must fit a {type(layer).__name__}, but {reason}")
    was_depthwise = is_depthwise(layer)
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        if name in layer._buffers:
            layer._buffers[name] = tensor
        else:
            layer._parameters[name] = nn.Parameter(tensor, requires_grad=getattr(layer, name).requires_grad)
    _set_sizes(layer, was_depthwise)


def why_not(layer: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why a layer cannot have tensors of these shapes.

    Args:
        layer: The layer, as it is.
        shapes: Shapes by the name of the parameter or buffer.

    Returns:
        The reason, as the end of a sentence, or None.

    Example:
        >>> why_not(nn.Conv2d(8, 8, 3), {"weight": (8, 8, 5, 5)})
        'its kernel is (3, 3), not (5, 5)'
    """
    for name, shape in shapes.items():
        old = {**layer._parameters, **layer._buffers}.get(name)
        if old is None:
            return f"it has no tensor called {name!r}"
        if old.ndim != len(shape):
            return f"its `{name}` has {old.ndim} dimensions, not {len(shape)}"
    if shapes and isinstance(layer, nn.MultiheadAttention):
        return "its parameters have sizes that depend on one another"
    new = shapes.get("weight")
    if new is None:
        return None
    if isinstance(layer, nn.modules.conv._ConvNd):
        if tuple(layer.weight.shape[2:]) != tuple(new[2:]):
            return f"its kernel is {tuple(layer.weight.shape[2:])}, not {tuple(new[2:])}"
        inside = new[1] if layer.transposed else new[0]
        if not is_depthwise(layer) and not layer.transposed and inside % layer.groups:
            return f"its {inside} channels do not fall into its {layer.groups} groups"
    if isinstance(layer, nn.GroupNorm) and new[0] % layer.num_groups:
        return f"its {new[0]} channels do not fall into its {layer.num_groups} groups"
    return None


def is_depthwise(layer: nn.Module) -> bool:
    """Return whether a layer is a convolution with several groups and one input channel in each.

    Args:
        layer: Any module.

    Returns:
        Whether it is.

    Example:
        >>> is_depthwise(nn.Conv2d(8, 16, 3, groups=8)), is_depthwise(nn.Conv2d(8, 16, 3, groups=4))
        (True, False)
    """
    return isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == layer.in_channels > 1


def resize_heads(attention: nn.Module, heads: int) -> None:
    """Set the number of an attention's heads; the size of a head stays.

    Args:
        attention: An attention as those of timm and transformers, with a number of heads as attribute. Changed in
            place: its attributes only, not its projections.
        heads: The number of remaining heads.

    Raises:
        ValueError: If it has no such attribute.

    Example:
        >>> attention = nn.Module()
        >>> attention.num_heads, attention.attn_dim = 4, 64
        >>> resize_heads(attention, 3)
        >>> attention.num_heads, attention.attn_dim
        (3, 48)
    """
    old = heads_of(attention)
    if old is None:
        raise ValueError(f"`attention` must have one of the attributes {_HEADS}, got {type(attention).__name__}")
    for name in (*_HEADS, *_ALL_HEADS):
        value = vars(attention).get(name)
        if isinstance(value, int):
            setattr(attention, name, value * heads // old)


def heads_of(module: nn.Module) -> int | None:
    """The number of an attention's heads, or None for a module that has no such attribute.

    Args:
        module: Any module.

    Returns:
        The number.

    Example:
        >>> heads_of(nn.Linear(2, 2)) is None
        True
    """
    values = (vars(module).get(name) for name in _HEADS)
    return next((value for value in values if isinstance(value, int)), None)


def head_attributes(module: nn.Module) -> dict[str, int]:
    """The attributes of an attention that change with its number of heads.

    Args:
        module: Any module.

    Returns:
        Values by name; nothing for a module that has no number of heads.

    Example:
        >>> head_attributes(nn.Linear(2, 2))
        {}
    """
    if heads_of(module) is None:
        return {}
    own = {name: vars(module).get(name) for name in (*_HEADS, *_ALL_HEADS)}
    return {name: value for name, value in own.items() if isinstance(value, int)}


def set_head_attributes(module: nn.Module, values: Mapping[str, int]) -> None:
    """Set the attributes of an attention that change with its number of heads.

    Args:
        module: The attention, changed in place.
        values: As `head_attributes` gives them.

    Raises:
        ValueError: If the module has no such attributes, or a value is not a positive int.
    """
    own = head_attributes(module)
    for name, value in values.items():
        if name not in own or type(value) is not int or value < 1:
            raise ValueError(f"{name!r} of a {type(module).__name__} must be one of {own} with an int, got {value!r}")
    for name, value in values.items():
        setattr(module, name, value)


def projections_of(attention: nn.Module) -> list[str]:
    """The names of the children that compute an attention's queries, keys and values, queries first.

    Args:
        attention: Any module.

    Returns:
        The names.

    Example:
        >>> projections_of(nn.ModuleDict({"proj": nn.Linear(2, 2), "k": nn.Linear(2, 2), "q": nn.Linear(2, 2)}))
        ['q', 'k']
    """
    children = attention._modules
    return [
        name
        for name in _PROJECTIONS
        if (child := children.get(name)) is not None
        and (isinstance(child, nn.Linear | nn.Sequential) or is_transposed(child))
    ]


def _set_sizes(layer: nn.Module, was_depthwise: bool) -> None:
    tensors = (layer._parameters.get("weight"), layer._buffers.get("running_mean"))
    shape = next((tuple(tensor.shape) for tensor in tensors if tensor is not None), None)
    if shape is None:
        return
    match layer:
        case nn.Linear():
            layer.out_features, layer.in_features = shape
        case _ if is_transposed(layer):
            vars(layer)["nx"], vars(layer)["nf"] = shape
        case nn.modules.conv._ConvNd():
            _set_channels(layer, shape, was_depthwise)
        case nn.GroupNorm():
            layer.num_channels = shape[0]
        case nn.Embedding():
            layer.num_embeddings, layer.embedding_dim = shape
        case nn.PReLU():
            layer.num_parameters = shape[0]
        case _ if "normalized_shape" in vars(layer):  # the layer and root-mean-square norms of torch and timm
            vars(layer)["normalized_shape"] = shape
        case _ if "num_features" in vars(layer):  # batch and instance norms
            vars(layer)["num_features"] = shape[0]


def _set_channels(layer: nn.modules.conv._ConvNd, shape: tuple[int, ...], was_depthwise: bool) -> None:
    if was_depthwise:
        multiplier = layer.out_channels // layer.groups
        layer.groups = shape[0] if layer.transposed else shape[0] // multiplier
    outer, inner = shape[0], shape[1] * layer.groups
    layer.out_channels, layer.in_channels = (inner, outer) if layer.transposed else (outer, inner)
