"""Checkpoint files and the models that belong to them."""

import importlib
import inspect
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_plugins._checks import nearest
from lightning_plugins.compression import restore_structure
from lightning_plugins.compression.structure.state_keys import clean

_PLACES = ("state_dict", "model", "model_state_dict")  # keys under which programs store a state dict
_OF_TRAINING = ("optimizer_states", "lr_schedulers", "loops", "callbacks")  # entries that do not fit a smaller network


class Checkpoint(NamedTuple):
    """Contents of a file.

    Attributes:
        whole: The full contents.
        place: The key of the state dict in them; None if they are the state dict.
        state: The state dict, tensors by name.
    """

    whole: dict[str, Any]
    place: str | None
    state: dict[str, Tensor]

    def with_state(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The same contents with another state dict, and without the state needed to resume training.

        Args:
            state: The state dict.

        Returns:
            What to save.
        """
        if self.place is None:
            return dict(state)
        if "pytorch-lightning_version" not in self.whole:
            return {self.place: dict(state)}
        kept = {key: value for key, value in self.whole.items() if key not in _OF_TRAINING}
        return {**kept, self.place: dict(state)}


def read_checkpoint(path: str) -> Checkpoint:
    """Read a Lightning checkpoint, or a state dict saved by `torch.save`, without running code in it.

    Args:
        path: The file.

    Returns:
        Its contents.

    Raises:
        ValueError: If it is not such a file, or has no named tensors.
    """
    if not Path(path).is_file():
        kind = "is a folder; consolidate a sharded checkpoint first" if Path(path).is_dir() else "does not exist"
        raise ValueError(f"`checkpoint` must be a file, and {path!r} {kind}")
    try:
        whole = _load(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, AttributeError, TypeError) as error:
        reason = str(error).partition(".")[0].partition("\n")[0]  # text and other files raise any of these
        raise ValueError(
            f"`checkpoint` must hold tensors and plain values alone, and {path!r} cannot be read so ({reason}); save "
            "`model.state_dict()` with `torch.save`"
        ) from error
    for place in (None, *_PLACES):
        found = whole if place is None else whole.get(place) if isinstance(whole, Mapping) else None
        if isinstance(found, Mapping) and found and all(isinstance(value, Tensor) for value in found.values()):
            return Checkpoint(dict(whole), place, dict(found))
    what = ", ".join(map(repr, list(whole)[:5])) if isinstance(whole, Mapping) else type(whole).__name__
    raise ValueError(f"`checkpoint` must be a state dict or hold one under {' or '.join(_PLACES)}, got {what}")


def _load(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "torchao" not in str(error) or find_spec("torchao") is None:
            raise
    import torchao.quantization  # noqa: F401  # which tells torch that its tensors are safe

    return torch.load(path, map_location="cpu", weights_only=True)


def import_object(name: str, path: str) -> Any:
    """Import ``"package.module:object"``, including from the working directory.

    Args:
        name: The argument's name, for the message.
        path: The path.

    Returns:
        The object.

    Raises:
        ValueError: If it does not exist.
    """
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"`{name}` must be written as 'package.module:callable', got {path!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"`{name}={path!r}` cannot be imported: {error}") from error
    if not hasattr(module, attribute):
        near = "".join(f"; did you mean {other!r}?" for other in nearest(attribute, vars(module), limit=1))
        raise ValueError(f"`{name}={path!r}`: {module_name} has no {attribute!r}{near}")
    found = getattr(module, attribute)
    if not callable(found):
        raise ValueError(f"`{name}={path!r}` must name something that can be called, got {type(found).__name__}")
    return found


def build_model(path: str, arguments: Mapping[str, Any], checkpoint: Checkpoint) -> nn.Module:
    """Build the dense network that a checkpoint belongs to.

    Args:
        path: ``"timm:<name>"``, or the import path of a class or function that returns the network.
        arguments: Its arguments. A LightningModule also gets the checkpoint's hyperparameters.
        checkpoint: The checkpoint.

    Returns:
        The network, in evaluation mode, with its own initial weights.

    Raises:
        ValueError: If that fails.
        ImportError: If timm is needed and missing.
    """
    make: Callable[..., Any]
    if path.startswith("timm:"):
        make, arguments = _timm_model(path.removeprefix("timm:")), dict(arguments)
    else:
        make = import_object("model", path)
        arguments = {**_hyperparameters(make, checkpoint), **arguments}
    try:
        model = make(**arguments)
    except TypeError as error:
        raise ValueError(f"`model_args` must be what {path!r} takes, got {dict(arguments)}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model={path!r}` must return a module, got {type(model).__name__}")
    return model.eval()


def load_into(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Give a network the structure and the values of a state dict.

    Args:
        model: The network, dense.
        state: The state dict; the network's names may have a common prefix, and there may be other entries.

    Returns:
        The prefix.

    Raises:
        ValueError: If the state dict does not belong to this network.
    """
    incoming = {clean(key): value for key, value in state.items()}
    prefix = _prefix(incoming, model)
    own = {key.removeprefix(prefix): value for key, value in incoming.items() if key.startswith(prefix)}
    restore_structure(model, own)
    try:
        model.load_state_dict(own)
    except RuntimeError as error:
        raise ValueError(f"`checkpoint` must be one of the network that `model` names, but {error}") from error
    return prefix


def _prefix(incoming: Mapping[str, Tensor], model: nn.Module) -> str:
    """Return the prefix of the network's names: the candidate under which most are found."""
    names = list(model.state_dict())
    candidates = {""} | {key.removesuffix(name) for name in names for key in incoming if key.endswith(f".{name}")}
    return max(sorted(candidates, key=len), key=lambda prefix: sum(f"{prefix}{name}" in incoming for name in names))


def _timm_model(name: str) -> Callable[..., Any]:
    try:
        import timm
    except ImportError as error:
        raise ImportError("`model='timm:...'` needs timm; run `pip install 'lightning-plugins[timm]'`") from error
    if not timm.is_model(name.partition(".")[0]):
        near = "".join(f"; did you mean 'timm:{other}'?" for other in nearest(name, timm.list_models(), limit=1))
        raise ValueError(f"`model` must name a model of timm, got {name!r}{near}")
    return lambda **arguments: timm.create_model(name, **arguments)


def _hyperparameters(make: Callable[..., Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the saved hyperparameters that a LightningModule's constructor accepts."""
    saved = checkpoint.whole.get("hyper_parameters", {})
    if not (isinstance(make, type) and hasattr(make, "load_from_checkpoint") and isinstance(saved, Mapping)):
        return {}
    parameters = inspect.signature(make).parameters.values()
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        return dict(saved)
    return {parameter.name: saved[parameter.name] for parameter in parameters if parameter.name in saved}
