"""A compressed network in a folder: its tensors, its configuration, and its structure for people to read."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lightning_plugins.compression.channels.resize import set_head_attributes
from lightning_plugins.compression.networks.arguments import check_module
from lightning_plugins.compression.networks.pretrained import configuration_tells, is_pretrained_model, warn_when_saved
from lightning_plugins.compression.networks.quantized import is_quantized
from lightning_plugins.compression.structure.configuration import update_configuration
from lightning_plugins.compression.structure.description import describe, differences
from lightning_plugins.compression.structure.folder_files import (
    STRUCTURE,
    fingerprint,
    read_structure,
    read_tensors,
    write_structure,
    write_tensors,
)
from lightning_plugins.compression.structure.restore_structure import restore_structure
from lightning_plugins.compression.structure.shallower import shallower

M = TypeVar("M", bound=nn.Module)

OWN_FILE = "compressed.safetensors"  # `from_pretrained` does not find it, and so does not load a part of it
PLAIN_FILE = "model.safetensors"


def save_compressed(model: nn.Module, folder: str | Path) -> None:
    """Write a compressed network into a folder from which `load_compressed` builds it again, bit for bit.

    The folder holds the tensors (safetensors), of a model of Hugging Face's transformers its ``config.json``, and
    ``structure.json``, which a person can read: every layer with its kind, sizes, rank and heads, the parameters that
    are tied, and the fingerprint of the file of tensors. Where the configuration says all of the structure (heads and
    perceptrons equally large in all layers) the tensors are called ``model.safetensors`` and
    ``from_pretrained`` loads them too; elsewhere they are called ``compressed.safetensors``, which it refuses instead
    of leaving layers at random values.

    A model's configuration is brought up to date first (`update_configuration`). Removed blocks of a model of
    transformers are left out and the others numbered anew, if its configuration can say how many are left. Under
    several processes call it on one of them.

    Args:
        model: The network; any module, such as a model of transformers or timm, or a `LightningModule`.
        folder: The folder; it is made if it is not there. Files of an earlier call are replaced.

    Raises:
        TypeError: If ``model`` is not a module, or ``folder`` no path.
        ValueError: If the model has integers for weights, tensors without values, or sharded ones; or state that is
            no tensor.
        ImportError: If safetensors is not installed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from lightning_plugins.compression import factorize
        >>> small = factorize(nn.Sequential(nn.Linear(8, 6)), 2)
        >>> with TemporaryDirectory() as folder:
        ...     save_compressed(small, folder)
        ...     again = load_compressed(lambda: nn.Sequential(nn.Linear(8, 6)), folder)
        >>> torch.equal(again[0][0].weight, small[0][0].weight)
        True
    """
    check_module(model)
    folder = _path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`folder` must be a folder, and {str(folder)!r} is a file")
    _state(model)  # checks it before anything is changed
    pretrained = is_pretrained_model(model)
    update_configuration(model)
    model = shallower(model) if pretrained else model
    tensors, tied = _without_doubles(_state(model))
    file = PLAIN_FILE if pretrained and configuration_tells(model) else OWN_FILE
    folder.mkdir(parents=True, exist_ok=True)
    for old in (STRUCTURE, PLAIN_FILE, OWN_FILE):  # written last: without the structure file the folder is incomplete
        (folder / old).unlink(missing_ok=True)
    write_tensors(folder / file, tensors)
    if pretrained:
        _write_configuration(model, folder)
    kind = type(model)
    write_structure(
        folder,
        {
            "class": f"{kind.__module__}.{kind.__qualname__}",
            "weights": {"file": file, "sha256": fingerprint(folder / file)},
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "tied": tied,
            "layers": describe(model),
        },
    )


def load_compressed(model: Callable[..., M], folder: str | Path) -> M:
    """Build the compressed network that `save_compressed` has written.

    Args:
        model: What builds the network as it was before compression: a class of transformers (``BertModel``,
            ``AutoModel``), which is given the configuration in the folder, or anything else that takes no argument.
        folder: The folder.

    Returns:
        The network, in evaluation mode, on the CPU, with the very tensors that were saved, types included.

    Raises:
        TypeError: If ``model`` cannot be called or returns no module, or ``folder`` is not a path.
        ValueError: If the folder holds no compressed network, a file of it is missing or was changed, or it is of
            another network than ``model`` builds.
        ImportError: If safetensors is not installed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from lightning_plugins.compression import factorize
        >>> with TemporaryDirectory() as folder:
        ...     save_compressed(factorize(nn.Sequential(nn.Linear(8, 6)), 2), folder)
        ...     load_compressed(lambda: nn.Sequential(nn.Linear(8, 6)), folder)[0][0].out_features
        2
    """
    folder = _path(folder)
    if isinstance(model, nn.Module) or not callable(model):
        raise TypeError(
            f"`model` must be a class or function that builds the network, got {type(model).__name__}; for an "
            "existing network call `restore_structure` and `load_state_dict`"
        )
    stored = read_structure(folder, files=(PLAIN_FILE, OWN_FILE))
    tensors = read_tensors(folder, stored["weights"]["file"], stored["weights"]["sha256"])
    built: Any = _build(model, folder)
    if not isinstance(built, nn.Module):
        raise TypeError(f"`model` must return a torch.nn.Module, got {type(built).__name__}")
    for other, first in stored["tied"].items():
        if first not in tensors or other in tensors:
            raise ValueError(
                f"`folder`: {STRUCTURE} ties {other!r} to {first!r}, where the file has not the one and not the other"
            )
        tensors[other] = tensors[first]
    try:
        restore_structure(built, tensors)
    except ValueError as error:
        whose = stored["class"].rpartition(".")[2]
        raise ValueError(f"`folder` holds a {whose} of another structure than `model` builds: {error}") from error
    _set_heads(built, stored["layers"])
    if reasons := differences(stored["layers"], describe(built)):
        raise ValueError(
            f"`folder`: {STRUCTURE} does not describe the network of its tensors, or not one that `model` builds: "
            + "; ".join(reasons[:3])
        )
    _load(built, tensors, stored["tied"])
    warn_when_saved(built)
    loaded: M = built.eval()  # type: ignore[assignment]  # checked to be a module, which is all that M says
    return loaded


def _set_heads(model: nn.Module, layers: Mapping[str, Any]) -> None:
    modules = dict(model.named_modules())
    for name, entry in layers.items():
        if name in modules and isinstance(entry.get("heads"), dict):
            try:
                set_head_attributes(modules[name], entry["heads"])
            except ValueError as error:
                raise ValueError(f"`folder`: {STRUCTURE}: {name!r}: {error}") from error


class _Holder(NamedTuple):
    module: nn.Module
    key: str


def _load(model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str]) -> None:
    """Values, types and ties."""
    own = model.state_dict(keep_vars=True)
    for name, tensor in own.items():
        if isinstance(tensor, Tensor) and name in tensors and tensor.dtype != tensors[name].dtype:
            tensor.data = tensor.data.to(tensors[name].dtype)
    try:
        model.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise ValueError(f"`folder` must be of the network that `model` builds, but {error}") from error
    for other, first in tied.items():
        one, two = _holder(model, first), _holder(model, other)
        if two.key in two.module._parameters:
            two.module._parameters[two.key] = one.module._parameters[one.key]


def _holder(model: nn.Module, name: str) -> _Holder:
    owner, _, key = name.rpartition(".")
    return _Holder(model.get_submodule(owner), key)


def _build(model: Any, folder: Path) -> Any:
    """The network before compression; the caller's random numbers are not touched."""
    with torch.random.fork_rng(devices=[]):
        if hasattr(model, "from_pretrained") and hasattr(model, "from_config"):  # AutoModel and its like
            from transformers import AutoConfig

            return model.from_config(AutoConfig.from_pretrained(_with_config(folder)))
        if hasattr(model, "from_pretrained") and getattr(model, "config_class", None) is not None:
            return _with_generation(model(model.config_class.from_pretrained(_with_config(folder))), folder)
        try:
            return model()
        except TypeError as error:
            raise TypeError(
                f"`model` must build the network without arguments, got {error}; pass a function such as "
                "`lambda: Net(width=64)`"
            ) from error


def _with_config(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ValueError(f"`folder`: {str(folder)!r} has no config.json, which a class of transformers is built from")
    return folder


def _with_generation(model: Any, folder: Path) -> Any:
    if (folder / "generation_config.json").is_file():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    return model


def _write_configuration(model: Any, folder: Path) -> None:
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _path(folder: str | Path) -> Path:
    if not isinstance(folder, str | Path):
        raise TypeError(f"`folder` must be a path, got {folder!r} ({type(folder).__name__})")
    return Path(folder)


def _state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"`model` must have tensors alone in its state, got {type(value).__name__} at {name!r}")
        if is_quantized(value):
            raise ValueError(f"`model`: {name!r} is quantised; save the floating network, and quantise what is loaded")
        if value.is_meta:
            raise ValueError(f"`model`: {name!r} is on the meta device and has no values to save")
        if hasattr(value, "full_tensor"):
            raise ValueError(f"`model`: {name!r} is sharded over processes; gather the network before it is saved")
    return dict(state)


def _without_doubles(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU, each once, and for the other names of one the first."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in state.items():
        known = first.setdefault(id(tensor), name)
        if known == name:
            tensors[name] = tensor.detach().cpu().contiguous().clone()
        else:
            tied[name] = known
    return tensors, tied
