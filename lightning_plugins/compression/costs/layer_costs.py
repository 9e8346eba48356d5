"""Costs of layers, dense and at every rank: weights, or floating-point operations of a forward pass."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from lightning_plugins._checks import check_choice
from lightning_plugins.compression.low_rank.layers import full_rank, matrix_shape
from lightning_plugins.compression.low_rank.splittable import Layer, select_layers
from lightning_plugins.compression.low_rank.transposed import as_linear
from lightning_plugins.compression.networks.arguments import check_example
from lightning_plugins.compression.networks.evaluation import evaluation, layer_by_layer, uncompiled
from lightning_plugins.weights import Scheme

Cost = Literal["params", "flops"]
COSTS: tuple[Cost, ...] = ("params", "flops")


class LayerCost(NamedTuple):
    """The cost of a layer as it is, and of its low-rank form.

    Attributes:
        dense: The cost of the dense layer.
        per_rank: What each rank adds to the cost of its low-rank form.
        full_rank: The largest rank its weight can have.

    Example:
        >>> cost = layer_costs(nn.Sequential(nn.Linear(30, 20)))["0"]
        >>> cost
        LayerCost(dense=600, per_rank=50, full_rank=20)
        >>> cost.at(3), cost.at(12), cost.break_even
        (150, 600, 11)
    """

    dense: int
    per_rank: int
    full_rank: int

    def at(self, rank: int) -> int:
        """The cost at a rank, or of the dense layer where that is less.

        Args:
            rank: The rank, at least 1.

        Returns:
            The cost.
        """
        return min(self.dense, rank * self.per_rank)

    @property
    def break_even(self) -> int:
        """The largest rank at which the low-rank form costs less than the layer; 0 if there is none."""
        return min(self.full_rank, max(0, self.dense - 1) // max(1, self.per_rank))


def layer_costs(
    model: nn.Module,
    layers: str | Sequence[str] = "*",
    *,
    cost: Cost = "params",
    inputs: Any = None,
    scheme: Scheme = 1,
) -> dict[str, LayerCost]:
    """The costs of the layers that can be factorised.

    Args:
        model: The model. For ``cost="flops"`` it is run once, in evaluation mode and without gradients.
        layers: A dotted name, a glob over dotted names, or a sequence of them.
        cost: ``"params"``: the number of weights (a bias is there in either form). ``"flops"``: twice the number of
            multiply-adds of the layers' products in one forward pass of ``inputs``, as `torch.utils.flop_counter`
            counts them; a layer that is called several times counts as often, one that is not called counts nothing.
        inputs: What the model takes, for ``"flops"``: a tensor, a tuple of arguments, or a dict of keyword arguments.
        scheme: How a kernel becomes a matrix; see `low_rank_layer`.

    Returns:
        Costs by the layers' dotted names, in the model's order.

    Raises:
        ValueError: If no layer can be split, or ``inputs`` is missing, or given although nothing is run.
        TypeError: If ``inputs`` is of another kind.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 10))
        >>> layer_costs(net, "0", cost="flops", inputs=torch.zeros(5, 3, 4, 4))
        {'0': LayerCost(dense=8640, per_rank=1400, full_rank=8)}
    """
    check_choice("cost", cost, COSTS)
    found = select_layers(model, layers, scheme=scheme, transposed=True)
    if cost == "params":
        if inputs is not None:
            raise ValueError("`inputs` must be left out with cost='params', for which nothing is run")
        return {name: _parameters(layer, scheme) for name, layer in found.items()}
    flops = dict.fromkeys(found, (0, 0))

    def hook(name: str) -> Any:
        def count(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            dense, per_rank = _flops(layer, args[0] if args else kwargs["input"], output, scheme)
            flops[name] = flops[name][0] + dense, flops[name][1] + per_rank

        return count

    handles = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in found.items()]
    try:
        run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: LayerCost(*flops[name], full_rank(layer, scheme=scheme)) for name, layer in found.items()}


def arguments_of(example: Any) -> Any:
    """The ``inputs`` of `run` that an ``example_input_array`` stands for: to Lightning a list holds the arguments.

    Args:
        example: A tensor, a tuple or list of arguments, a dict of keyword arguments, or None.

    Returns:
        A tuple for a list, everything else as it is.

    Example:
        >>> arguments_of([1, 2]), arguments_of(None)
        ((1, 2), None)
    """
    return tuple(example) if isinstance(example, list) else example


def run(model: nn.Module, inputs: Any) -> Any:
    """Run a model once, in evaluation mode and without gradients, and leave it as it was.

    Args:
        model: The model; a compiled one runs uncompiled, so that hooks are called.
        inputs: A tensor, a tuple of arguments, or a dict of keyword arguments.

    Returns:
        What the model returns.

    Raises:
        TypeError: If ``inputs`` is of another kind.
        ValueError: If ``inputs`` is None.

    Example:
        >>> import torch
        >>> run(nn.Flatten(), {"input": torch.zeros(2, 3, 4)}).shape
        torch.Size([2, 12])
    """
    if inputs is None:
        raise ValueError("`inputs` must be given to count operations: a tensor, a tuple or a dict, got None")
    check_example("inputs", inputs)
    with evaluation(model), uncompiled(), layer_by_layer(), _constants(model), warnings.catch_warnings():
        # torch's counter of operations sets hooks on all modules; compiled ones warn of that, and run uncompiled here.
        warnings.filterwarnings("ignore", message="Using `torch.compile")
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@contextmanager
def _constants(model: nn.Module) -> Iterator[None]:
    """With parameters that take no gradient: torch's counter fails on views of those that do, such as class tokens."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learned:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


def _parameters(layer: Layer, scheme: Scheme) -> LayerCost:
    return LayerCost(layer.weight.numel(), sum(matrix_shape(layer, scheme=scheme)), full_rank(layer, scheme=scheme))


def _flops(layer: Layer, given: Tensor, output: Tensor, scheme: Scheme) -> tuple[int, int]:
    """FLOPs of one call: of the dense layer, and per rank of its low-rank form."""
    rows, columns = matrix_shape(layer, scheme=scheme)
    places = output.numel() // len(as_linear(layer).weight)
    dense = 2 * places * layer.weight.numel()
    if scheme == 2 and isinstance(layer, nn.Conv2d) and layer.kernel_size[0] > 1:
        # The first kernel moves along the width only: it keeps the rows of its input, whatever the stride.
        kept = places // output.shape[-2] * given.shape[-2] if output.shape[-2] else 0
        return dense, 2 * (kept * columns + places * rows)
    return dense, 2 * places * (rows + columns)
