"""The report of a compression under a budget."""

from typing import Any

from torch import nn

from lightning_plugins.callbacks._compression.settings import CompressionSettings
from lightning_plugins.compression.budget.budget import Projection
from lightning_plugins.compression.budget.budgeted_network import BudgetedNetwork
from lightning_plugins.compression.costs.network_costs import NetworkCosts, measure_network
from lightning_plugins.compression.reports.report import CompressionReport, UnitsKept


def budget_report(
    before: NetworkCosts,
    model: nn.Module,
    inputs: Any,
    network: BudgetedNetwork,
    choice: Projection,
    settings: CompressionSettings,
) -> CompressionReport:
    """Count the small network anew, and say what was chosen.

    Args:
        before: What the dense network cost.
        model: The network, small by now.
        inputs: What it takes; without, operations are not counted.
        network: What was chosen in.
        choice: What stayed.
        settings: What the callback was told.

    Returns:
        The report.
    """
    kept = {
        name: UnitsKept(int(keep.sum()), group.size)
        for group, keep in zip(network.groups, choice.kept, strict=True)
        for name in group.layers
    }
    after = measure_network(model, inputs, latency=False)
    return CompressionReport(before, after, kept, settings.cost, settings.budget)
