"""``lightning-plugins compress``: a checkpoint of a smaller network from a checkpoint."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn

from lightning_plugins._deprecation import Replaced, renamed, share_left
from lightning_plugins.cli._files import build_model, import_object, load_into, read_checkpoint
from lightning_plugins.cli._outputs import beside, check_outputs, write_whole
from lightning_plugins.compression import (
    BeamOptions,
    Calibration,
    RankSearch,
    beam_search,
    compression_report,
    energy_threshold,
    equal_ratio,
    factorize,
    output_energy,
    rich_progress,
    trade_off,
)
from lightning_plugins.compression import quantize as int8
from lightning_plugins.compression.costs.layer_costs import arguments_of
from lightning_plugins.compression.networks.quantized import is_quantized
from lightning_plugins.compression.reports.export import export_onnx
from lightning_plugins.plots import compression_figure, require_matplotlib

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
Method = Literal["equal_ratio", "energy_threshold", "trade_off", "output_energy", "beam_search"]
_WITHOUT_SCORE: dict[str, Callable[..., RankSearch]] = {
    "equal_ratio": equal_ratio,
    "energy_threshold": energy_threshold,
    "trade_off": trade_off,
    "output_energy": output_energy,
}


@renamed(listed=True, ratio=Replaced("budget", share_left))
def compress(
    checkpoint: str,
    *,
    model: str,
    budget: float = 0.5,
    method: Method = "trade_off",
    layers: str | list[str] = "*",
    cost: Literal["params", "flops"] = "params",
    scheme: Literal[1, 2] = 1,
    model_args: dict[str, Any] | None = None,
    input_shape: list[int] | None = None,
    input_dtype: Literal["float", "int"] = "float",
    data: str | None = None,
    calibration: str | None = None,
    quantize: Literal["int8"] | None = None,
    latency: bool = True,
    output: str | None = None,
    export: str | None = None,
    force: bool = False,
) -> None:
    """Replace layers of a trained network by low-rank ones, and write a checkpoint of the smaller network.

    With a calibration the error of the layers' outputs is minimised instead of that of their weights. Quantise last: a
    quantised network cannot be compressed further; load it with lightning_plugins.compression.load_quantized.

    A report of parameters, FLOPs and time before and after, and its figure, are written next to the checkpoint. To load
    the checkpoint, build the dense network and call lightning_plugins.compression.restore_structure before
    load_state_dict.

    Args:
        checkpoint: A Lightning checkpoint, or a state dict saved with torch.save.
        model: How to build the dense network: 'package.module:callable', or 'timm:resnet18'.
        budget: The fraction of the layers' cost to keep, between 0 and 1; the older ratio, 1 - budget, is also accepted
            until the next minor version.
        method: How the ranks are chosen; beam_search needs data, the others use only the weights.
        layers: The layers: dotted name, glob over dotted names, or a list of them.
        cost: The cost that the budget limits: parameters, or floating-point operations.
        scheme: How a convolution is split: 1 into k x k and 1 x 1, 2 into 1 x k and k x 1.
        model_args: Arguments for the model's callable, such as '{num_classes: 10}'.
        input_shape: Shape of the network's input, such as '[1,3,224,224]', if the network does not define it.
        input_dtype: Whether that input consists of random floats, or of integer zeros, such as tokens.
        data: For beam_search: 'package.module:callable', which receives the network and returns batches and a score.
        calibration: 'package.module:callable', which receives the network and returns batches or a Calibration.
        quantize: int8 stores the weights of linear layers, low-rank ones too, as integers; needs torchao.
        latency: Whether to measure the time of a forward pass before and after.
        output: The new checkpoint; by default <checkpoint>-compressed next to the old one.
        export: ONNX file to which the smaller network is exported as well, and checked.
        force: Whether existing files may be replaced; never the input checkpoint.

    Raises:
        ValueError: If an argument is incompatible with the others, the checkpoint or the network.
    """
    if (method == "beam_search") != (data is not None):
        raise ValueError(f"`data` must be given with `method=beam_search` and with no other, got method={method}")
    require_matplotlib()
    console = Console()
    source = Path(checkpoint)
    target = source.with_name(f"{source.stem}-compressed{source.suffix}") if output is None else Path(output)
    files = {"checkpoint": target, "report": beside(target, ".json"), "figure": beside(target, ".png")}
    check_outputs(files | ({} if export is None else {"ONNX file": Path(export)}), [source], force=force)
    old = read_checkpoint(checkpoint)
    dense = build_model(model, model_args or {}, old)
    if any(is_quantized(value) for value in old.state.values()):
        raise ValueError(f"`checkpoint`: {checkpoint!r} is quantised; compress the floating one and quantise last")
    prefix = load_into(dense, old.state)
    needed = "cost=flops" if cost == "flops" else "latency=true" if latency else "export" if export else ""
    inputs = _inputs(dense, input_shape, input_dtype, needed)
    small = copy.deepcopy(dense)
    moments = _calibrated(small, layers, calibration)
    search = _search(
        small, method, data, moments, budget=budget, layers=layers, cost=cost, scheme=scheme, inputs=inputs
    )
    factorize(small, search.ranks, layers, scheme=scheme, calibration=moments)
    report = compression_report(dense, small, inputs, latency=latency)
    console.print(report.table())
    exported: list[float] = []
    if export is not None and inputs is not None:  # quantised networks cannot be exported
        write_whole(Path(export), lambda path: exported.append(export_onnx(small, inputs, path)))
    if quantize is not None:
        int8(small)
    own = {f"{prefix}{name}" for name in dense.state_dict()}
    others = {name: value for name, value in old.state.items() if name not in own}
    saved = old.with_state({**others, **{f"{prefix}{k}": v for k, v in small.state_dict().items()}})
    figure = compression_figure(report, title=target.name)
    write_whole(target, lambda path: torch.save(saved, path))
    write_whole(files["report"], lambda path: path.write_text(report.to_json()))
    write_whole(files["figure"], figure.savefig)
    console.print("wrote {}, {} and {}".format(*files.values()), soft_wrap=True, markup=False)
    if exported:
        console.print(
            f"wrote {export}, whose outputs differ by {exported[0]:.1e} at most", soft_wrap=True, markup=False
        )


def _calibrated(model: nn.Module, layers: str | list[str], path: str | None) -> Calibration | None:
    if path is None:
        return None
    made = import_object("calibration", path)(model)
    return made if isinstance(made, Calibration) else Calibration(model, layers).record(made)


def _search(
    model: nn.Module,
    method: Method,
    data: str | None,
    moments: Calibration | None,
    *,
    inputs: Inputs | None,
    **settings: Any,
) -> RankSearch:
    wanted = inputs if settings["cost"] == "flops" else None
    if data is None:
        if moments is not None and method != "equal_ratio":
            settings["calibration"] = moments
        return _WITHOUT_SCORE[method](model, inputs=wanted, **settings)
    made = import_object("data", data)(model)
    if not isinstance(made, tuple) or len(made) != 2:
        raise ValueError(f"`data={data!r}` must return batches and a score function, got {type(made).__name__}")
    batches, score = made
    with rich_progress() as progress:
        options = BeamOptions(calibration=moments, progress=progress)
        return beam_search(model, batches, score, inputs=wanted, options=options, **settings)


def _inputs(model: nn.Module, shape: list[int] | None, dtype: str, needed: str) -> Inputs | None:
    """An input of the given shape or, without one, the network's own example input; None if none is needed."""
    if shape is None:
        example = arguments_of(getattr(model, "example_input_array", None))  # of a LightningModule
        if isinstance(example, Tensor | tuple | Mapping):
            return example
        configuration = getattr(model, "pretrained_cfg", None)  # of timm
        size = configuration.get("input_size") if isinstance(configuration, dict) else None
        if size is None and not needed:
            return None
        if size is None:
            raise ValueError(
                f"`input_shape` must be given for {needed}, such as [1,3,224,224]: the network does not say it itself; "
                "with `--latency false` and `cost=params` it is not needed"
            )
        shape = [1, *size]
    if any(size < 1 for size in shape):
        raise ValueError(f"`input_shape` must be of sizes of at least 1, got {shape}")
    parameter = next(model.parameters())
    if dtype == "int":
        return torch.zeros(shape, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(parameter.dtype)
