"""Source of the teacher of a distillation: a copy of the network, a checkpoint, or a function."""

import copy
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_plugins._lightning import MisconfigurationException
from lightning_plugins.callbacks._rows.pool import resolve_callable
from lightning_plugins.compression.networks.sharded import is_sharded, whole_copy
from lightning_plugins.compression.structure.restore_structure import restore_structure
from lightning_plugins.compression.structure.state_keys import clean

START = "start"
_FILES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
_RULE = "'start', the path of a checkpoint, or the import path of a function that returns the network"


def check_teacher(teacher: Any) -> Any:
    """Check what can be checked of a teacher without a network.

    Args:
        teacher: What the user gave.

    Returns:
        It.

    Raises:
        TypeError: If it is of the wrong kind.
        ValueError: If a file is missing, or nothing can be imported.
    """
    if isinstance(teacher, nn.Module) or (isinstance(teacher, str) and teacher == START):
        return teacher
    if isinstance(teacher, Path) or (isinstance(teacher, str) and teacher.endswith(_FILES)):
        if not Path(teacher).is_file():
            raise ValueError(f"`teacher` must be {_RULE}; there is no file {str(teacher)!r}")
        return teacher
    resolve_callable("teacher", teacher, _RULE)
    return teacher


def make_teacher(teacher: Any, network: nn.Module) -> nn.Module:
    """Make the network that is learnt from.

    Args:
        teacher: As `check_teacher` lets it pass.
        network: The network that learns, as it is before it is changed.

    Returns:
        A network of its own, in evaluation mode and without gradients.

    Raises:
        MisconfigurationException: If the network cannot be copied as it was before compression.
        ValueError: If the checkpoint is of another network.
        TypeError: If the function returns no module.
    """
    if isinstance(teacher, nn.Module):
        return freeze(copy.deepcopy(teacher))
    if teacher == START:
        return freeze(_copied(network))
    if isinstance(teacher, Path) or teacher.endswith(_FILES):
        return freeze(_loaded(Path(teacher), _copied(network)))
    made = resolve_callable("teacher", teacher, _RULE)()
    if not isinstance(made, nn.Module):
        raise TypeError(f"`teacher={teacher!r}` must return a torch.nn.Module, got {type(made).__name__}")
    return freeze(made)


def freeze(network: nn.Module) -> nn.Module:
    """Put a network into evaluation mode, without gradients.

    Args:
        network: The network, changed in place.

    Returns:
        It.
    """
    for parameter in network.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return network.eval()


def _copied(network: nn.Module) -> nn.Module:
    if any(
        is_parametrized(module) and "lightning_plugins" in str(module.parametrizations) for module in network.modules()
    ):
        raise MisconfigurationException(
            "`teacher='start'` copies the network before it is compressed, and there are masks on it already; put "
            "Distillation before the callback that compresses in the Trainer's list"
        )
    return whole_copy(network) if is_sharded(network) else _uncompiled(copy.deepcopy(network))


def _uncompiled(copied: nn.Module) -> nn.Module:
    """A copy of a compiled `LightningModule` calls compiled functions of the original: let it call its own."""
    if vars(copied).get("_compiler_ctx") is not None:
        for name in ("_compiler_ctx", "forward", "training_step", "validation_step", "test_step", "predict_step"):
            vars(copied).pop(name, None)
    return copied


def _loaded(path: Path, network: nn.Module) -> nn.Module:
    """A copy of the network with the weights of a checkpoint, whose names may have a prefix that the network's lack."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            whole: Any = load_file(path)
        else:
            whole = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"`teacher`: {str(path)!r} cannot be read as a checkpoint: {error}") from error
    state = whole.get("state_dict", whole) if isinstance(whole, dict) else whole
    if not isinstance(state, dict):
        raise ValueError(f"`teacher`: {str(path)!r} must hold a state dict, got {type(state).__name__}")
    own = list(network.state_dict())
    incoming = {clean(str(key)): value for key, value in state.items()}
    prefixes = {key.removesuffix(own[0]) for key in incoming if own and key.endswith(own[0])}
    prefix = max(prefixes, key=lambda p: sum(p + name in incoming for name in own), default="")
    chosen = {key.removeprefix(prefix): value for key, value in incoming.items() if key.startswith(prefix)}
    try:
        restore_structure(network, chosen, strict=False).load_state_dict({n: chosen[n] for n in own if n in chosen})
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"`teacher`: {str(path)!r} must be a checkpoint of the network: {error}") from error
    return network
