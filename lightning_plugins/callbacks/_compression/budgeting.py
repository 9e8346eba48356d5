"""A network whose channels and ranks are selected during training: planned at the start, verified with real steps."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from lightning_plugins._lightning import (
    LightningModule,
    MixedPrecision,
    Trainer,
    isolate_rng,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_plugins.callbacks._compression.costs import example_inputs
from lightning_plugins.callbacks._compression.settings import CompressionSettings
from lightning_plugins.callbacks._compression.steps import StepTrial
from lightning_plugins.compression.budget.budget import Projection
from lightning_plugins.compression.budget.budgeted_network import BudgetedNetwork
from lightning_plugins.compression.budget.carried_state import closed_blocks
from lightning_plugins.compression.costs.layer_costs import run
from lightning_plugins.compression.costs.network_costs import NetworkCosts, measure_network
from lightning_plugins.compression.reports.report import CompressionReport, UnitsKept


def plan_network(
    name: str,
    settings: CompressionSettings,
    pl_module: LightningModule,
    inputs: Any,
    groups: Iterable[dict[str, Any]] | None,
) -> BudgetedNetwork:
    """Find what can be compressed, and report what cannot; the module is not changed.

    Args:
        name: Of the callback.
        settings: Its settings.
        pl_module: The module.
        inputs: Its example input, on its device.
        groups: The state of the groups of channels, in a resumed training.

    Returns:
        The network, without masks and thresholds.

    Raises:
        ValueError: If nothing can be compressed, or the budget cannot be met.
    """
    network = BudgetedNetwork(pl_module, settings, inputs=inputs, groups=groups, attach=False)
    network.followed = not settings.masks or groups is not None
    if network.untouched:
        rank_zero_warn(f"{name}: of what `layers` matches, {network.untouched}")
    _tell_blocks(name, network)
    return network


def _tell_blocks(name: str, network: BudgetedNetwork) -> None:
    blocks = [group.block for group in network.groups if group.block]
    if blocks:
        over = "".join(f"; {block!r} stays: {reason}" for block, reason in network.passed_over.items())
        rank_zero_info(f"{name}: the blocks that may be removed are {', '.join(map(repr, blocks))}{over}")


def require_fitting_steps(
    name: str, trainer: Trainer, pl_module: LightningModule, network: BudgetedNetwork, batch: Any
) -> None:
    """Keep groups of channels whole that the module's steps need, and warn; all processes call.

    Args:
        name: Of the callback.
        trainer: The Trainer.
        pl_module: Its module.
        network: The network, before masks are put on.
        batch: The first batch.

    Raises:
        ValueError: If the budget cannot be met without them.
    """
    network.followed = True
    with isolate_rng():
        trial = StepTrial(trainer, pl_module, batch)
        refused = trainer.strategy.broadcast(trial.refused(network.groups))
    if refused:
        few = "; ".join(f"{group!r} {reason}" for group, reason in list(refused.items())[:3])
        rank_zero_warn(f"{name}: {len(refused)} groups of channels and blocks are kept whole: {few}")
        network.leave_out(refused)
    beyond = [] if trial.steps else _beyond_forward(trainer, pl_module)
    if beyond:
        rank_zero_warn(
            f"{name}: {', '.join(map(repr, beyond[:3]))} are called by no forward pass of the example input, and "
            "the training step cannot be tried on a copy; if they read channels of other layers, name those in `keep`"
        )


def budget_report(
    before: NetworkCosts,
    model: nn.Module,
    inputs: Any,
    network: BudgetedNetwork,
    choice: Projection,
    settings: CompressionSettings,
) -> CompressionReport:
    """Count the small network's cost independently, and report the selection.

    Args:
        before: What the dense network cost.
        model: The network, small by now.
        inputs: What it takes; without, operations are not counted.
        network: The network.
        choice: What stayed.
        settings: The settings of the callback.

    Returns:
        The report.
    """
    gone = closed_blocks(network.groups, choice)
    kept = {
        name: UnitsKept(int(keep.sum()), group.size)
        for group, keep in zip(network.groups, choice.kept, strict=True)
        for name in (*group.layers, *filter(None, [group.block]))
        if not name.startswith(gone)
    }
    after = measure_network(model, inputs, latency=False)
    return CompressionReport(before, after, kept, settings.cost, settings.budget)


def _beyond_forward(trainer: Trainer, pl_module: LightningModule) -> list[str]:
    """The modules with parameters that a forward pass of the example input does not call."""
    owners = {name: module for name, module in pl_module.named_modules() if name and module._parameters}
    seen: set[str] = set()
    handles = [m.register_forward_pre_hook(lambda *_, name=name: seen.add(name)) for name, m in owners.items()]
    try:
        run(pl_module, example_inputs(trainer, pl_module))
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in owners if name not in seen]


@contextmanager
def as_written(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Run the module's own forward pass: in the precision of its weights, and not as compiled."""
    own = vars(pl_module)
    compiled = own.pop("forward", None) if pl_module._compiler_ctx is not None else None
    plugin = trainer.precision_plugin
    try:
        with nullcontext() if isinstance(plugin, MixedPrecision) else plugin.forward_context():
            yield
    finally:
        if compiled is not None:
            own["forward"] = compiled
