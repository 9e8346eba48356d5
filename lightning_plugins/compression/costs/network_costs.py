"""Costs of a network: parameters and floating-point operations of every layer, and the time of a forward pass."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_plugins._checks import check_bool, check_positive_int
from lightning_plugins.compression.costs.layer_costs import run
from lightning_plugins.compression.low_rank.splittable import is_low_rank_pair
from lightning_plugins.compression.networks.evaluation import evaluation
from lightning_plugins.selection import WRAPPERS

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]

_WARM_UP = 3  # passes: the first ones allocate memory, choose kernels and, where asked to, compile


class LayerSize(NamedTuple):
    """Costs of one layer.

    Attributes:
        params: Its parameters, bias included; those that several layers share count for the first.
        flops: Floating-point operations of its own in one forward pass, twice the number of multiply-adds; None if they
            were not counted.
    """

    params: int
    flops: int | None


class Latency(NamedTuple):
    """Time of a forward pass.

    Attributes:
        median_ms: The median, in milliseconds.
        low_ms: The lower quartile.
        high_ms: The upper quartile.
        runs: How many passes were timed.
        device: Where, such as ``"cpu, 2 threads"``.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    device: str


@dataclass(frozen=True)
class NetworkCosts:
    """Costs of a network, layer by layer.

    Attributes:
        layers: By dotted name, in the model's order: every module that has parameters or operations of its own. The two
            halves of a low-rank layer stand together under the layer's name, the parameters of a parametrization under
            that of the layer.
        latency: The time of a forward pass, if it was measured.
        ranks: Of low-rank layers, by dotted name.
    """

    layers: dict[str, LayerSize]
    latency: Latency | None = None
    ranks: dict[str, int] = field(default_factory=dict)

    @property
    def params(self) -> int:
        """All parameters."""
        return sum(layer.params for layer in self.layers.values())

    @property
    def flops(self) -> int | None:
        """Operations of a forward pass, as `torch.utils.flop_counter.FlopCounterMode` counts them; or None."""
        counts = [layer.flops for layer in self.layers.values()]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None


def measure_network(
    model: nn.Module, inputs: Inputs | None, *, latency: bool = True, repeats: int = 30
) -> NetworkCosts:
    """Count a network's parameters and operations, and measure the time of a forward pass.

    The model runs in evaluation mode and without gradients, and is left as it was.

    Args:
        model: The model.
        inputs: What it takes, on its device: a tensor, a tuple of arguments, or a dict of keyword arguments; None, with
            ``latency=False``, to count parameters alone, without a forward pass.
        latency: Whether to measure the time.
        repeats: How many passes to time, after three that are not.

    Returns:
        The costs.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If ``repeats`` is less than 1, ``inputs`` None with ``latency``, or a parameter without a shape
            (lazy).

    Example:
        >>> costs = measure_network(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.zeros(5, 4), latency=False)
        >>> costs.layers, costs.flops
        ({'0': LayerSize(params=15, flops=120)}, 120)
    """
    check_positive_int("repeats", repeats)
    check_bool("latency", latency)
    check_model("model", model)
    sizes = _layer_sizes(model, check_inputs(inputs) if latency else inputs)
    time_taken = measure_latencies([model], check_inputs(inputs), repeats)[0] if latency else None
    return NetworkCosts(sizes, time_taken, _ranks(model))


def check_inputs(inputs: Inputs | None) -> Inputs:
    """Return the inputs for timing a forward pass.

    Raises:
        ValueError: If there is nothing.
    """
    if inputs is None:
        raise ValueError(
            "`inputs` must be given to measure the time: a tensor, a tuple or a dict, got None; pass `latency=False` "
            "to count parameters alone"
        )
    return inputs


def measure_latencies(models: Sequence[nn.Module], inputs: Inputs, repeats: int) -> list[Latency]:
    """Time forward passes of several models in turns, so that what slows the machine down slows all of them.

    Args:
        models: The models.
        inputs: What each of them takes.
        repeats: How many passes of each to time.

    Returns:
        One result per model.
    """
    times: list[list[float]] = [[] for _ in models]
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluation(model))
        for number in range(_WARM_UP + repeats):
            for model, own in zip(models, times, strict=True):
                spent = _timed(model, inputs)
                if number >= _WARM_UP:
                    own.append(1e3 * spent)
    return [_summary(own, _device(model)) for own, model in zip(times, models, strict=True)]


def check_model(name: str, model: object) -> None:
    """Raise an error unless it is a module with initialised parameters.

    Raises:
        TypeError: If it is not a module.
        ValueError: If a parameter is lazy.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`{name}` must be a module, got {type(model).__name__}")
    lazy = [key for key, parameter in model.named_parameters() if nn.parameter.is_lazy(parameter)]
    if lazy:
        raise ValueError(f"`{name}` must have parameters with shapes, but {lazy[0]!r} is lazy; run a batch through it")


def _layer_sizes(model: nn.Module, inputs: Inputs | None) -> dict[str, LayerSize]:
    flops = {} if inputs is None else _flops_by_module(model, inputs)
    labels = _labels(model)
    sizes: dict[str, LayerSize] = {}
    counted: set[int] = set()
    for module, label in labels.items():
        own = {id(p): p.numel() for p in module._parameters.values() if p is not None and id(p) not in counted}
        counted.update(own)
        params, operations = sum(own.values()), flops.get(module, 0)
        if params or operations:
            before = sizes.get(label, LayerSize(0, 0))
            sizes[label] = LayerSize(before.params + params, (before.flops or 0) + operations)
    if inputs is None:
        return {label: size._replace(flops=None) for label, size in sizes.items()}
    return sizes


def _labels(model: nn.Module) -> dict[nn.Module, str]:
    """Each module's clean name: that of the whole layer for halves of low-rank layers and for parametrizations."""
    labels: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        segments = [segment for segment in name.split(".") if segment not in WRAPPERS]
        if "parametrizations" in segments:
            segments = segments[: segments.index("parametrizations")]
        labels[module] = ".".join(segments) or type(model).__name__
    for module in list(labels):
        if _is_low_rank(module):
            labels[module[0]] = labels[module[1]] = labels[module]
    return labels


def _is_low_rank(module: nn.Module) -> TypeGuard[nn.Sequential]:
    return type(module) is nn.Sequential and len(module) == 2 and is_low_rank_pair(module[0], module[1])


def _ranks(model: nn.Module) -> dict[str, int]:
    return {
        label: next(module[0].parameters()).shape[0] for module, label in _labels(model).items() if _is_low_rank(module)
    }


def _flops_by_module(model: nn.Module, inputs: Inputs) -> dict[nn.Module, int]:
    """The operations that each module does itself, not through the modules that it calls."""
    counter = FlopCounterMode(display=False)
    flops: dict[nn.Module, int] = {}
    under_way: list[list[int]] = [[0, 0]]  # operations at the call, and of the modules called since

    def enter(module: nn.Module, *_: Any) -> None:
        under_way.append([counter.get_total_flops(), 0])

    def leave(module: nn.Module, *_: Any) -> None:
        at_call, of_others = under_way.pop()
        spent = counter.get_total_flops() - at_call
        flops[module] = flops.get(module, 0) + spent - of_others
        under_way[-1][1] += spent

    handles = []
    for module in model.modules():
        # The first pre-hook and the last hook: operations of other hooks are attributed to the module.
        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave))
    try:
        with counter:
            run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return flops


def _timed(model: nn.Module, inputs: Inputs) -> float:
    _wait(model)
    started = time.perf_counter()
    if isinstance(inputs, Mapping):
        model(**inputs)
    elif isinstance(inputs, tuple):
        model(*inputs)
    else:
        model(inputs)
    _wait(model)
    return time.perf_counter() - started


def _wait(model: nn.Module) -> None:
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.is_cuda:
        torch.cuda.synchronize(parameter.device)


def _device(model: nn.Module) -> str:
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.is_cuda:
        return torch.cuda.get_device_name(parameter.device)
    kind = "cpu" if parameter is None else parameter.device.type
    return f"cpu, {torch.get_num_threads()} threads" if kind == "cpu" else kind


def _summary(times: Sequence[float], device: str) -> Latency:
    low, median, high = torch.tensor(times, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    return Latency(float(median), float(low), float(high), len(times), device)
