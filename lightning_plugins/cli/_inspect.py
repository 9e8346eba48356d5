"""``lightning-plugins inspect``: the spectra of a checkpoint's weights."""

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from lightning_plugins.cli._files import read_checkpoint
from lightning_plugins.functional.weight_spectrum import summarize_spectrum, weight_singular_values
from lightning_plugins.plots import layer_spectra_figure, require_matplotlib


def inspect(checkpoint: str, layers: str = "*", output: str | None = None) -> None:
    """Show singular values and stable ranks of the weights in a checkpoint. No model is built.

    Weights are its floating-point tensors that are matrices of two rows and columns or more once all dimensions but the
    first are made one, as convolutions are by scheme 1.

    Args:
        checkpoint: A Lightning checkpoint, or a state dict saved with torch.save.
        layers: Only weights whose name matches this glob.
        output: Writes <output>.json, with all singular values, and the figure <output>.png.

    Raises:
        ValueError: If the checkpoint cannot be read, or holds no such weight.
    """
    if output is not None:
        require_matplotlib()
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
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    listed = {name: {**own, "singular_values": spectra[name].tolist()} for name, own in numbers.items()}
    Path(f"{target}.json").write_text(json.dumps(listed, indent=1))
    finite = {name: values for name, values in spectra.items() if torch.isfinite(values).all()}
    if finite:
        layer_spectra_figure(finite, title=Path(checkpoint).name).savefig(f"{target}.png")
    console.print(f"wrote {target}.json" + (f" and {target}.png" if finite else ""))


def _weights(state: dict[str, Tensor], layers: str) -> dict[str, Tensor]:
    floating = {name: tensor for name, tensor in state.items() if tensor.is_floating_point() and tensor.ndim > 1}
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


def _numbers(weight: Tensor, values: Tensor) -> dict[str, Any]:
    return {"shape": list(weight.shape), "full_rank": len(values), **summarize_spectrum(values)._asdict()}


def _table(title: str, numbers: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=title, caption="full, stable and effective rank, and spectral norm")
    table.add_column("weight", overflow="fold", ratio=1)
    for name in ("shape", "rank", "stable", "effective", "norm"):
        table.add_column(name, justify="right")
    for name, own in numbers.items():
        shape = "x".join(map(str, own["shape"]))
        figures = [f"{own[key]:.4g}" for key in ("stable_rank", "effective_rank", "spectral_norm")]
        table.add_row(name, shape, str(own["full_rank"]), *figures)
    return table
