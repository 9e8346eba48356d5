"""The files of a compressed network: written, read, and checked for changes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

STRUCTURE = "structure.json"
FORMAT = "lightning_plugins compressed network, version 1"
_ENTRIES = {"format": str, "class": str, "weights": dict, "parameters": int, "tied": dict, "layers": dict}


def write_structure(folder: Path, structure: Mapping[str, Any]) -> None:
    """Write the description of a network, one layer a line.

    Args:
        folder: The folder.
        structure: Primitives, with the layers under ``"layers"``.
    """
    rest = {"format": FORMAT, **{key: value for key, value in structure.items() if key != "layers"}}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in rest.items()]
    layers = [f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in structure["layers"].items()]
    text = "\n".join(["{", *lines, '  "layers": {', ",\n".join(layers), "  }", "}"])
    (folder / STRUCTURE).write_text(text + "\n", encoding="utf-8")


def read_structure(folder: Path, *, files: Sequence[str]) -> dict[str, Any]:
    """Read the description of a network.

    Args:
        folder: The folder.
        files: What the file of tensors may be called.

    Returns:
        The description, with all its entries.

    Raises:
        ValueError: If there is none, or an entry is missing or of another kind.
    """
    if not folder.is_dir():
        raise ValueError(f"`folder` must be a folder that `save_compressed` has written, and {str(folder)!r} is none")
    path = folder / STRUCTURE
    if not path.is_file():
        there = ", ".join(sorted(file.name for file in folder.iterdir())[:5]) or "nothing"
        raise ValueError(f"`folder` must hold a compressed network, and {str(folder)!r} has no {STRUCTURE}: {there}")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`folder`: {path} cannot be read as JSON: {error}") from error
    if not isinstance(stored, dict):
        raise ValueError(f"`folder`: {path} must hold an object, got {type(stored).__name__}")
    for key, kind in _ENTRIES.items():
        if not isinstance(stored.get(key), kind):
            raise ValueError(f"`folder`: {path} must have {key!r} ({kind.__name__}), got {stored.get(key)!r}")
    if stored["format"] != FORMAT:
        raise ValueError(f"`folder`: {path} must be of the format {FORMAT!r}, got {stored['format']!r}")
    if stored["weights"].get("file") not in files or not isinstance(stored["weights"].get("sha256"), str):
        rule = f"must name {' or '.join(files)} with its sha256 under 'weights'"
        raise ValueError(f"`folder`: {path} {rule}, got {stored['weights']!r}")
    for name, entry in stored["layers"].items():
        if not isinstance(entry, dict) or not isinstance(entry.get("sizes"), dict):
            raise ValueError(f"`folder`: {path} must give the sizes of the layer {name!r}, got {entry!r}")
    return stored


def fingerprint(path: Path) -> str:
    """The SHA-256 of a file.

    Args:
        path: The file.

    Returns:
        64 hexadecimal digits.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name.

    Args:
        path: The file.
        tensors: Contiguous tensors on the CPU, none of which shares memory with another.

    Raises:
        ImportError: If safetensors is not installed.
    """
    _safetensors().save_file(dict(tensors), path, metadata={"format": "pt"})


def read_tensors(folder: Path, file: str, sha256: str) -> dict[str, Tensor]:
    """Read tensors by name.

    Args:
        folder: The folder.
        file: The file's name.
        sha256: The fingerprint that it must have.

    Returns:
        The tensors, on the CPU.

    Raises:
        ValueError: If the file is missing, or is not the one of this fingerprint.
        ImportError: If safetensors is not installed.
    """
    path = folder / file
    if not path.is_file():
        raise ValueError(f"`folder`: {file}, which {STRUCTURE} names, is missing in {str(folder)!r}")
    if fingerprint(path) != sha256:
        raise ValueError(
            f"`folder`: {path} is not the file that {STRUCTURE} was written for (its SHA-256 differs); one of them was "
            "changed, or is of another network"
        )
    tensors: dict[str, Tensor] = _safetensors().load_file(path)
    return tensors


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "files of compressed networks need safetensors: `pip install 'lightning-plugins[huggingface]'`"
        ) from error
    return safetensors.torch
