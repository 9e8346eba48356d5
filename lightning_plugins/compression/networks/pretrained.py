"""Hugging Face transformers models: whether their configuration still matches their structure."""

import copy
import warnings
from types import MethodType
from typing import Any

import torch
from torch import nn


def is_pretrained_model(module: nn.Module) -> bool:
    """Return whether a module is a model of transformers, with a configuration and a method ``save_pretrained``.

    Args:
        module: Any module; transformers is not imported for it.

    Returns:
        Whether it is.

    Example:
        >>> is_pretrained_model(nn.Linear(2, 2))
        False
    """
    return callable(getattr(type(module), "save_pretrained", None)) and hasattr(
        getattr(module, "config", None), "to_dict"
    )


def configuration_tells(model: nn.Module) -> bool:
    """Return whether a model built from the configuration has tensors of the same names and shapes.

    Args:
        model: A model of transformers.

    Returns:
        Whether ``from_pretrained`` could load what ``save_pretrained`` writes.
    """
    state = copy.deepcopy(getattr(model, "config"))  # noqa: B009  # a plain module has no such attribute to type
    with torch.device("meta"):
        fresh: nn.Module = type(model)(state)
    return _shapes(fresh) == _shapes(model)


def warn_when_saved(model: nn.Module) -> None:
    """Make ``save_pretrained`` of a compressed transformers model warn about its files.

    ``from_pretrained`` builds the network of the configuration and leaves at random values whatever has other names
    there, with no error. The method is replaced on the model alone, and on those of transformers inside it; copies and
    pickles of the model go on working.

    Args:
        model: The model, compressed.
    """
    for module in model.modules():
        if is_pretrained_model(module) and "save_pretrained" not in vars(module):
            vars(module)["save_pretrained"] = MethodType(save_pretrained, module)


def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Call transformers' method, with a warning where ``from_pretrained`` would not restore this model.

    Args:
        self: The model.
        *args: As for transformers' method.
        **kwargs: As for transformers' method.

    Returns:
        What that returns.
    """
    if not configuration_tells(self):
        warnings.warn(
            f"`save_pretrained` of a compressed {type(self).__name__} writes weights that `from_pretrained` loads only "
            "in part, leaving the compressed layers at random values; save it with "
            "`lightning_plugins.compression.save_compressed`, and load it with `load_compressed`",
            stacklevel=2,
        )
    return type(self).save_pretrained(self, *args, **kwargs)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
