"""``lightning-plugins inspect``: the spectra of a checkpoint's weights."""

import json
import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor

from lightning_plugins.cli._files import read_checkpoint
from lightning_plugins.cli._outputs import check_outputs, write_whole
from lightning_plugins.functional.weight_spectrum import summarize_spectrum, weight_singular_values
from lightning_plugins.plots import layer_spectra_figure, require_matplotlib


def inspect(checkpoint: str, layers: str = "*", output: str | None = None, force: bool = False) -> None:
    """Show singular values and stable ranks of the weights in a checkpoint. No model is built.

    Weights are floating-point tensors with at least two rows and columns after flattening all dimensions but the first,
    as for convolutions in scheme 1.

    Args:
        checkpoint: A Lightning checkpoint, or a state dict saved with torch.save.
        layers: Only weights whose name matches this glob.
        output: Writes <output>.json, with all singular values (non-finite numbers as null), and the figure
            <output>.png.
        force: Whether existing files may be replaced.

    Raises:
        ValueError: If the checkpoint cannot be read, or holds no such weight.
    """
    files: dict[str, Path] = {}
    if output is not None:
        require_matplotlib()
        files = {"report": Path(f"{output}.json"), "figure": Path(f"{output}.png")}
        check_outputs(files, [Path(checkpoint)], force=force)
    console = Console()
    weights = _weights(read_checkpoint(checkpoint).state, layers)
    spectra = {
        name: weight_singular_values(weight.flatten(1))
        for name, weight in track(weights.items(), "decomposing", console=console, transient=True)
    }
    numbers = {name: _numbers(weights[name], values) for name, values in spectra.items()}
    console.print(_table(Path(checkpoint).name, numbers))
    if output is None:
        return
    listed = {name: {**own, "singular_values": spectra[name].tolist()} for name, own in numbers.items()}
    text = json.dumps(_plain(listed), indent=1, allow_nan=False)
    write_whole(files["report"], lambda path: path.write_text(text))
    finite = {name: values for name, values in spectra.items() if torch.isfinite(values).all()}
    if finite:
        figure = layer_spectra_figure(finite, title=Path(checkpoint).name)
        write_whole(files["figure"], figure.savefig)
    written = f"wrote {files['report']}" + (f" and {files['figure']}" if finite else "")
    console.print(written, soft_wrap=True, markup=False)


def _plain(value: Any) -> Any:
    """Replace numbers that JSON cannot represent by null."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _weights(state: dict[str, Tensor], layers: str) -> dict[str, Tensor]:
    floating = {name: dense for name, tensor in state.items() if (dense := _readable(tensor)) is not None}
    found = {
        name: tensor
        for name, tensor in floating.items()
        if min(tensor.flatten(1).shape) > 1 and (fnmatchcase(name, layers) or fnmatchcase(name, f"{layers}.weight"))
    }
    if not found:
        few = ", ".join(list(floating)[:4]) or "none at all"
        raise ValueError(
            f"`layers` must match a weight with two rows and columns or more, got {layers!r}; it has {few}"
        )
    return found


def _readable(tensor: Tensor) -> Tensor | None:
    """A weight as a dense tensor of a dtype that can be decomposed; None for other tensors or without values."""
    if tensor.is_meta or tensor.is_quantized or tensor.is_complex() or not tensor.is_floating_point():
        return None
    dense = (tensor.to_dense() if tensor.layout != torch.strided else tensor).contiguous()
    if dense.dtype not in (torch.float32, torch.float64):
        dense = dense.float()
    return dense if dense.ndim > 1 else None


def _numbers(weight: Tensor, values: Tensor) -> dict[str, Any]:
    return {"shape": list(weight.shape), "full_rank": len(values), **summarize_spectrum(values)._asdict()}


def _table(title: str, numbers: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=escape(title), caption="full, stable and effective rank, and spectral norm")
    table.add_column("weight", overflow="fold", ratio=1)
    for name in ("shape", "rank", "stable", "effective", "norm"):
        table.add_column(name, justify="right")
    for name, own in numbers.items():
        shape = "x".join(map(str, own["shape"]))
        figures = [f"{own[key]:.4g}" for key in ("stable_rank", "effective_rank", "spectral_norm")]
        table.add_row(escape(name), shape, str(own["full_rank"]), *figures)
    return table
