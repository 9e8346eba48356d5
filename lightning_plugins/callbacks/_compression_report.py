"""What every layer and the whole network cost before and after a compression under a budget, in plain numbers."""

from typing import Any

from torch import nn

from lightning_plugins.callbacks._budgeted_network import BudgetedNetwork
from lightning_plugins.compression.budget import Projection
from lightning_plugins.compression.network_costs import measure_network

_Sizes = dict[str, dict[str, int]]


class CompressionCosts:
    """The costs of a dense network, to compare with those of the small one.

    Args:
        model: The network while it is dense.
        inputs: What it takes; without, operations are not counted.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.before = _sizes(model, inputs)

    def report(self, model: nn.Module, inputs: Any, network: BudgetedNetwork, choice: Projection) -> dict[str, Any]:
        """The report that the callbacks give.

        Args:
            model: The network, small by now.
            inputs: What it takes.
            network: What was chosen in.
            choice: What stayed.

        Returns:
            A dict of primitives.
        """
        after = _sizes(model, inputs, names=list(self.before))
        layers: dict[str, dict[str, Any]] = {}
        for name, sizes in self.before.items():
            layers[name] = {kind: [number, after[name][kind]] for kind, number in sizes.items()}
        for group, keep in zip(network.groups, choice.kept, strict=True):
            for name in group.layers:
                layers.setdefault(name, {})["kept"] = [int(keep.sum()), group.size]
        for name, rank in choice.ranks.items():
            layers.setdefault(name, {})["rank"] = rank
        budget = network.budget
        share = {
            "target": budget.target,
            "share": choice.cost / budget.dense,
            "left": choice.cost,
            "dense": budget.dense,
        }
        return {"before": _sums(self.before), "after": _sums(after), "layers": layers, "budget": share}


def _sizes(model: nn.Module, inputs: Any, names: list[str] | None = None) -> _Sizes:
    layers = measure_network(model, inputs, latency=False).layers
    kinds = ("params",) if inputs is None else ("params", "flops")
    found = {name: {kind: getattr(size, kind) for kind in kinds} for name, size in layers.items()}
    return {name: found.get(name, dict.fromkeys(kinds, 0)) for name in names or found}


def _sums(sizes: _Sizes) -> dict[str, int]:
    kinds = next(iter(sizes.values()))
    return {kind: sum(size[kind] for size in sizes.values()) for kind in kinds}
