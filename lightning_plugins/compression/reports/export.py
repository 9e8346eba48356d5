"""Networks as ONNX files, checked against the network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_plugins.compression.costs.network_costs import Inputs
from lightning_plugins.compression.networks.evaluation import evaluation

TOLERANCE = 1e-4


def export_onnx(model: nn.Module, inputs: Inputs, path: str | Path, *, tolerance: float = TOLERANCE) -> float:
    """Write a network to an ONNX file, run it with ONNX Runtime, and compare.

    Low-rank and pruned networks consist of plain layers, so nothing but plain operators is in the file. The model is
    exported in evaluation mode and left as it was.

    Args:
        model: The network, on the CPU.
        inputs: What it takes: a tensor, a tuple of arguments, or a dict of keyword arguments. The file is for inputs of
            these shapes.
        path: The file, all weights in it.
        tolerance: The largest difference that is allowed, absolute or as a share of the largest output.

    Returns:
        The largest absolute difference between outputs of the network and of the file.

    Raises:
        ValueError: If the outputs differ by more; the file is removed then.
        ImportError: If ``onnx``, ``onnxscript`` or ``onnxruntime`` is missing.
    """
    try:
        import onnxruntime  # type: ignore[import-untyped]  # it carries no types
        import onnxscript  # noqa: F401  # which torch.onnx needs, and names without saying how to get it
    except ImportError as error:
        raise ImportError(f"ONNX files need {error.name}; run `pip install 'lightning-plugins[onnx]'`") from error
    positional, named = _split(inputs)
    with evaluation(model):
        expected = [leaf for leaf in tree_leaves(model(*positional, **named)) if isinstance(leaf, Tensor)]
        torch.onnx.export(model, positional, path, kwargs=named, dynamo=True, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = [leaf.numpy() for leaf in tree_leaves((positional, named)) if isinstance(leaf, Tensor)]
    names = [wanted.name for wanted in session.get_inputs()]
    found = [torch.from_numpy(output) for output in session.run(None, dict(zip(names, given, strict=True)))]
    worst = 0.0
    for ours, theirs in zip(expected, found, strict=True):
        difference = float((ours - theirs).abs().max())
        if not difference <= tolerance * max(1.0, float(ours.abs().max())):  # written so that NaN fails too
            Path(path).unlink()
            raise ValueError(f"the ONNX file gives outputs that differ by {difference:.3g} from the network's")
        worst = max(worst, difference)
    return worst


def _split(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}
