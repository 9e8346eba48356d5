"""The configuration of a transformers model, updated after compression."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lightning_plugins.compression.channels.attention import head_size
from lightning_plugins.compression.channels.resize import head_attributes
from lightning_plugins.compression.networks.pretrained import is_pretrained_model

_HEADS = (
    *("num_attention_heads", "num_key_value_heads", "num_heads", "n_heads", "n_head"),
    *("encoder_attention_heads", "decoder_attention_heads", "decoder_num_heads"),
)
_WIDTHS = ("intermediate_size", "hidden_dim", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim")
# The checks of configurations and of models that are built from them.
BUILD_ERRORS = (ValueError, RuntimeError, TypeError, ZeroDivisionError, AttributeError, IndexError, KeyError)
_SHARED = "num_key_value_groups"
_ABSENT = object()
_Sizes = dict[str, tuple[int, ...]]


def update_configuration(model: nn.Module) -> list[str]:
    """Update the configuration of a compressed transformers model as far as it can express the structure.

    Numbers of heads and widths of perceptrons that are alike in all layers are set one by one; each is kept only if a
    model built from the new configuration is nearer to this one and nowhere smaller. What cannot be expressed, such as
    sizes that differ by layer, stays as it is: `save_compressed` stores it beside the configuration.

    Args:
        model: The model, of which the configuration is changed in place.

    Returns:
        The names that were set; nothing for a model of another kind.

    Example:
        >>> update_configuration(nn.Linear(2, 2))
        []
    """
    if not is_pretrained_model(model):
        return []
    own, changed = _sizes(model), list[str]()
    best = _missing(own, _fresh(model))
    while best and (step := _step(model, own, best)) is not None:
        best = step[1]
        changed.append(step[0])
    return list(dict.fromkeys(changed))


def _step(model: Any, own: _Sizes, best: int) -> tuple[str, int] | None:
    """The first setting that brings a fresh model nearer, made; None if none does."""
    fresh = _fresh(model) or {}
    pairs = {
        (old, new)
        for name, shape in own.items()
        for old, new in zip(fresh.get(name, ()), shape, strict=False)
        if old != new
    }
    for config in configurations(model.config):
        for settings in _candidates(config, sorted(pairs)):
            before = {key: getattr(config, key, _ABSENT) for key in settings}
            _set(config, settings)
            found = _missing(own, _fresh(model))
            if found is not None and found < best:
                return next(iter(settings)), found
            _set(config, before)
    return None


def _candidates(config: Any, pairs: list[tuple[int, int]]) -> Iterator[dict[str, int]]:
    for key in _WIDTHS:
        value = getattr(config, key, "absent")
        yield from ({key: new} for old, new in pairs if value == old or value is None)
    keys = [key for key in _HEADS if isinstance(getattr(config, key, None), int)]
    for old, new in pairs:
        settings = {key: getattr(config, key) * new // old for key in keys if (getattr(config, key) * new) % old == 0}
        if settings and min(settings.values()) > 0:
            yield settings
            if hasattr(config, "hidden_size"):  # of which a head is a fraction, unless it says otherwise
                yield {**settings, "head_dim": config.hidden_size // max(getattr(config, keys[0]), 1)}
            yield from ({key: value} for key, value in settings.items())


def _set(config: Any, settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        if value is _ABSENT:
            delattr(config, key)
        else:
            setattr(config, key, value)


def configurations(config: Any) -> Iterator[Any]:
    """A configuration and those in it.

    Args:
        config: The configuration of a model.

    Yields:
        Configurations.
    """
    yield config
    yield from (value for value in vars(config).values() if hasattr(value, "to_dict") and hasattr(value, "model_type"))


def _fresh(model: Any) -> _Sizes | None:
    """The sizes of a model that is built from the configuration; None if none can be."""
    try:
        with torch.device("meta"):
            return _sizes(type(model)(copy.deepcopy(model.config)))
    except BUILD_ERRORS:
        return None


def _sizes(model: nn.Module) -> _Sizes:
    found: _Sizes = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, module in model.named_modules():
        if heads := head_attributes(module):
            found[f"{name} heads"] = (*heads.values(), head_size(module))
        if isinstance(shared := vars(module).get(_SHARED), int):
            found[f"{name} {_SHARED}"] = (shared,)
    return found


def _missing(own: _Sizes, fresh: _Sizes | None) -> int | None:
    """Return the number of sizes that differ; None if a fresh model is smaller anywhere, or there is none."""
    if fresh is None:
        return None
    for name, shape in own.items():
        other = fresh.get(name, shape)
        if name.endswith(_SHARED) and other != shape:
            return None  # no shape tells it
        if len(other) == len(shape) and any(mine > theirs for mine, theirs in zip(shape, other, strict=True)):
            return None
    return sum(fresh.get(name) != shape for name, shape in own.items())
