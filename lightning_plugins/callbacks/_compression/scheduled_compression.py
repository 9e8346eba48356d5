"""Base of the callbacks that compress under a budget: phases, own optimizer, surgery, checkpoints."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_plugins._lightning import LightningModule, Trainer, isolate_rng
from lightning_plugins.callbacks._compression.budgeting import (
    as_written,
    budget_report,
    plan_network,
    require_fitting_steps,
)
from lightning_plugins.callbacks._compression.compressing_callback import CompressingCallback
from lightning_plugins.callbacks._compression.costs import example_inputs
from lightning_plugins.callbacks._compression.record import ChoiceRecord
from lightning_plugins.callbacks._compression.requirements import require_alone, require_compression
from lightning_plugins.callbacks._compression.settings import CompressionSettings
from lightning_plugins.callbacks._surgery.averages import averages_of, pair_by_plain_names, put_averages_in_place
from lightning_plugins.callbacks._surgery.mirrors import warn_of_mirrors
from lightning_plugins.callbacks._surgery.rewrapping import rewrap
from lightning_plugins.callbacks._surgery.swap import operate
from lightning_plugins.callbacks._terms.logged import log_value
from lightning_plugins.callbacks._trainer.phases import reached
from lightning_plugins.callbacks._trainer.progress import training_progress
from lightning_plugins.compression.budget.budgeted_network import BudgetedNetwork
from lightning_plugins.compression.budget.choice import Choice
from lightning_plugins.compression.costs.network_costs import measure_network
from lightning_plugins.compression.networks.plain_names import plain_names
from lightning_plugins.plots.style import has_matplotlib

_SOFT, _WHOLE, _HARD = "soft", "whole", "hard"
_PARTS = ("channel_masks", "rank_thresholds")


class ScheduledCompression(CompressingCallback):
    """Choose channels and ranks under a budget while a network trains, then make it smaller and train on.

    `HybridCompression` describes the phases. Masks and thresholds are attached between ``begin`` and the surgery only,
    so that the module restores a checkpoint, makes its optimizers and is wrapped by DDP without them: the user's
    optimizers never see a score, and no parameter group changes. Scores and thresholds have their own optimizer, which
    steps with the user's, and are saved in the callback's part of a checkpoint.

    Args:
        settings: The arguments of the subclass.
    """

    def __init__(self, settings: CompressionSettings) -> None:
        super().__init__(settings.layers)
        self.settings = settings
        self._hooks: list[RemovableHandle] = []
        self._network: BudgetedNetwork | None = None
        self._choice: Choice | None = None  # once masks and thresholds are on
        self._unpair = self._take_back = _nothing

    def _forget(self) -> None:
        super()._forget()
        self._state: dict[str, Any] | None = None  # of the choice, until it is attached
        self._mode = _WHOLE
        self._updated_at = -1
        self._share: Tensor | float = 1.0
        self._ranks: dict[str, Any] = {}  # numbers, as tensors on the device or from a checkpoint
        self._record = ChoiceRecord()

    def _require(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_compression(type(self).__name__, self.settings, trainer, pl_module)
        require_alone(self, trainer, (CompressingCallback,))

    def _arguments(self) -> str:
        return repr(self.settings)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name, state = type(self).__name__, self._state
        warn_of_mirrors(name, pl_module)
        with isolate_rng(), as_written(trainer, pl_module):
            self._costs = measure_network(pl_module, example_inputs(trainer, pl_module), latency=False)
            groups = None if state is None else state["network"]["groups"]
            network = plan_network(name, self.settings, pl_module, example_inputs(trainer, pl_module), groups)
        self._network = network
        if state is None:
            return
        if self._mode == _WHOLE:
            network.scores.load_state_dict(state["network"].get("scores"), network.masks)
        else:
            self._attach(trainer, pl_module, network).load_state_dict(state)
            network.bypass(False)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set masks and thresholds for this step."""
        if batch_idx == 0:  # when resuming after an epoch's last batch, Lightning skips `on_train_epoch_start`
            self._advance(trainer, pl_module)
        if self._network is not None:
            self._let_act(trainer, pl_module, self._network, batch)
        if self._norms is not None:
            self._norms.before_batch()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Step the optimizer of scores and thresholds along with the user's."""
        if self._network is None or not self.settings.learned:
            return
        if self._mode == _WHOLE:
            self._network.scores.saliency.observe(None)
        elif self._mode == _SOFT and self._choice is not None:
            self._share, self._ranks = self._choice.step(_unscaling(trainer, pl_module.device))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the budget, and the fraction kept of every layer."""
        self._rest_norms()
        network = self._network
        log_value(pl_module, f"budget/{self.settings.cost}", self._share, prog_bar=True)
        if network is None:
            return
        kept = network.kept_shares()
        for name, part in kept.items():
            log_value(pl_module, f"mask/{name}/kept", part)
        for name, rank in self._ranks.items():
            log_value(pl_module, f"rank/{name}", rank)
        self._record.add(trainer.global_step, self._share, kept, self._ranks)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decompose averaged weights for themselves, which Lightning puts in place for the validation."""
        thresholds = None if self._choice is None else self._choice.network.thresholds
        if thresholds is not None and averages_of(trainer):
            self._take_back = thresholds.set_aside()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the decompositions of the weights that are trained."""
        self._take_back()
        self._take_back = _nothing

    def _missed(self) -> str:
        phase = self.settings.phase
        return (
            f"`end={phase.end}` ({phase.unit}), so nothing was removed: the module is the dense one; "
            "train on, or choose an earlier `end`"
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module: a network that is not smaller yet is the dense one again."""
        super().teardown(trainer, pl_module, stage)
        network, self._network = self._network, None
        self._let_go()
        if network is not None:
            self._state = self._own_state(network)
            self._choice = None
            network.remove()

    def state_dict(self) -> dict[str, Any]:
        """Scores, thresholds, their optimizer, and the report once the network is small."""
        own = self._state if self._network is None else self._own_state(self._network)
        place = {"mode": self._mode, "updated_at": self._updated_at, "share": float(self._share)}
        ranks = {name: float(rank) for name, rank in self._ranks.items()}
        return {**super().state_dict(), "own": own, **place, "ranks": ranks, "record": self._record.state_dict()}

    def _resume(self, entry: Callable[[str], Any]) -> None:
        self._state = entry("own")
        self._mode, self._updated_at, self._share = entry("mode"), entry("updated_at"), entry("share")
        self._ranks = dict(entry("ranks"))
        self._record.load_state_dict(entry("record"))

    def _own_state(self, network: BudgetedNetwork) -> dict[str, Any]:
        if self._choice is not None:
            return self._choice.state_dict()
        return {"network": network.state_dict(), "optimizer": None}

    def _attach(self, trainer: Trainer, pl_module: LightningModule, network: BudgetedNetwork) -> Choice:
        """Put masks and thresholds on: optimizers and DDP are there by now and have not seen them."""
        with isolate_rng():
            network.attach()
        save, load = plain_names(network.renamed, dict(zip(_PARTS, (network.masks, network.thresholds), strict=True)))
        self._hooks = [
            pl_module.register_state_dict_post_hook(save),  # type: ignore[no-untyped-call]  # torch's
            pl_module.register_load_state_dict_pre_hook(load),  # type: ignore[no-untyped-call]  # torch's
        ]
        rewrap(trainer, pl_module, _PARTS)
        self._unpair = pair_by_plain_names(trainer, network.renamed)
        self._choice = Choice(network, self.settings.rates)
        return self._choice

    def _let_go(self) -> None:
        """Remove what is around the module for the time of the choice."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._unpair()
        self._unpair = self._take_back = _nothing

    def _let_act(self, trainer: Trainer, pl_module: LightningModule, network: BudgetedNetwork, batch: Any) -> None:
        settings = self.settings
        if not network.followed:
            with as_written(trainer, pl_module):
                require_fitting_steps(type(self).__name__, trainer, pl_module, network, batch)
        if self._mode == _HARD or not reached(trainer, settings.phase.begin, settings.phase.unit):
            return
        choice = self._choice or self._attach(trainer, pl_module, network)
        if reached(trainer, settings.phase.end, settings.phase.unit):
            self._harden(trainer, choice)
            return
        if self._mode == _WHOLE:
            network.begin()
        self._mode = _SOFT
        way = settings.way
        done = min(max(way(training_progress(trainer, with_totals=way.needs_total)), 0.0), 1.0)
        if settings.learned:
            choice.act(done)
        elif self._updated_at < 0 or trainer.global_step >= self._updated_at + settings.rates.update_every:
            self._updated_at = trainer.global_step
            before, found = network.kept(), network.choose_heaviest(1 - done * (1 - settings.budget))
            network.be_hard(found.kept)
            self._share = found.cost / network.budget.dense
            if any(bool((one.cpu() != other).any()) for one, other in zip(before, found.kept, strict=True)):
                self._restart_norms()

    def _harden(self, trainer: Trainer, choice: Choice) -> None:
        """End the choice: masks are zeros and ones from now on."""
        network, settings = choice.network, self.settings
        found = choice.harden() if settings.learned else network.choose_heaviest(settings.budget)
        found = trainer.strategy.broadcast(found)
        network.be_hard(found.kept)
        self._restart_norms()
        self._mode, self._share = _HARD, found.cost / network.budget.dense

    def _advance(self, trainer: Trainer, pl_module: LightningModule, *, last: bool = False) -> None:
        """Make the network smaller if it is due, between two epochs."""
        settings, network = self.settings, self._network
        if network is None or not reached(trainer, settings.phase.end, settings.phase.unit, between_epochs=True):
            return
        if last:
            put_averages_in_place(trainer, pl_module)
        choosing = self._choice or self._attach(trainer, pl_module, network)
        if self._mode != _HARD:
            self._harden(trainer, choosing)
        choice = trainer.strategy.broadcast(network.choose())  # ranks may have risen again since
        self._let_go()
        network.bake(choice)
        with as_written(trainer, pl_module):
            operate(trainer, pl_module, lambda: network.shrink(choice))
            inputs = example_inputs(trainer, pl_module)
            report = budget_report(self._costs, pl_module, inputs, network, choice, settings)
        self._network = self._state = self._choice = None
        self._share = choice.cost / network.budget.dense
        self._record.add(trainer.global_step, self._share, network.kept_shares(choice.kept), choice.ranks, last=True)
        self._deliver(trainer, pl_module, report, last=last)
        if settings.figures and trainer.is_global_zero and has_matplotlib():
            self._record.draw(trainer, report, settings)


def _nothing() -> None:
    """Do nothing."""


def _unscaling(trainer: Trainer, device: torch.device) -> Tensor | None:
    """Return the factor that undoes the scale of fp16: Lightning unscales the user's optimizer's parameters only."""
    scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else 1 / scaler.scale(torch.ones((), device=device))
