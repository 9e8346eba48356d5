"""Base of the callbacks that compress under a budget: phases, own optimizer, surgery, checkpoints."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_plugins._lightning import Callback, LightningModule, Trainer, isolate_rng, rank_zero_warn
from lightning_plugins.callbacks._compression.budgeting import as_written, plan_network, require_fitting_steps
from lightning_plugins.callbacks._compression.costs import example_inputs
from lightning_plugins.callbacks._compression.recalibration import recalibrate_norms
from lightning_plugins.callbacks._compression.record import ChoiceRecord
from lightning_plugins.callbacks._compression.report import budget_report
from lightning_plugins.callbacks._compression.requirements import require_alone, require_compression
from lightning_plugins.callbacks._compression.saved_state import adopt_older_entry, entry_of, warn_of_lost_state
from lightning_plugins.callbacks._compression.settings import CompressionSettings
from lightning_plugins.callbacks._surgery.mirrors import warn_of_mirrors
from lightning_plugins.callbacks._surgery.monitors import forget_best, warn_if_unsaved
from lightning_plugins.callbacks._surgery.restored_structure import StructureHook
from lightning_plugins.callbacks._surgery.rewrapping import rewrap
from lightning_plugins.callbacks._surgery.swap import operate, require_operable_optimizers
from lightning_plugins.callbacks._terms.logged import log_value
from lightning_plugins.callbacks._trainer.phases import in_epoch, is_last_epoch, reached
from lightning_plugins.callbacks._trainer.progress import training_progress
from lightning_plugins.callbacks._trainer.requirements import require_lightning_module
from lightning_plugins.callbacks.low_rank_compression import LowRankCompression
from lightning_plugins.compression.budget.budgeted_network import BudgetedNetwork
from lightning_plugins.compression.budget.choice import Choice
from lightning_plugins.compression.costs.network_costs import measure_network
from lightning_plugins.compression.networks.norm_statistics import NormStatistics
from lightning_plugins.compression.networks.plain_names import plain_names
from lightning_plugins.compression.reports.report import CompressionReport

_SOFT, _WHOLE, _HARD = "soft", "whole", "hard"
_PARTS = ("channel_masks", "rank_thresholds")


class ScheduledCompression(Callback):
    """Choose channels and ranks under a budget while a network trains, then make it smaller and train on.

    `HybridCompression` says what happens when. Masks and thresholds are on the module between ``begin`` and the
    surgery only, so that the module restores a checkpoint, makes its optimizers and is wrapped by DDP as it is without
    them: no optimizer of the user's ever sees a score, and no parameter group changes. Scores and thresholds have an
    optimizer of their own that steps with the user's, and stand in the callback's part of a checkpoint.

    Args:
        settings: The arguments of the subclass.
    """

    def __init__(self, settings: CompressionSettings) -> None:
        super().__init__()
        self.settings = settings
        self._compressed: weakref.ref[LightningModule] | None = None
        self._handles: list[RemovableHandle] = []
        self._hooks: list[RemovableHandle] = []
        self._structure = StructureHook()
        self._network: BudgetedNetwork | None = None
        self._norms: NormStatistics | None = None
        self._choice: Choice | None = None  # once masks and thresholds are on
        self._forget()

    def _forget(self) -> None:
        self.report: CompressionReport | None = None
        self._small = False  # as a checkpoint had it whose callback was another
        self._state: dict[str, Any] | None = None  # of the choice, while it is not there
        self._mode = _WHOLE
        self._updated_at = -1
        self._share: Tensor | float = 1.0
        self._ranks: dict[str, Any] = {}  # numbers, as tensors on the device or from a checkpoint
        self._record = ChoiceRecord()
        self._jump: int | None = None  # batches since masks last jumped

    @property
    def finished(self) -> bool:
        """True if the network is the small one."""
        return self.report is not None or self._small

    @property
    def state_key(self) -> str:
        """The class and the layers, so that a training is resumed with other rates, figures or budgets as well."""
        return self._generate_state_key(layers=self.settings.layers)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module and the Trainer, and make the module ready for checkpoints of its compressed form."""
        require_lightning_module(type(self).__name__, pl_module)
        self._structure.made_small = False
        self._handles.append(pl_module.register_load_state_dict_pre_hook(self._structure))  # type: ignore[no-untyped-call]  # torch's
        if stage != "fit":
            return
        require_compression(type(self).__name__, self.settings, trainer, pl_module)
        require_alone(self, trainer, (ScheduledCompression, LowRankCompression))
        if trainer.global_step == 0 and (self._compressed is None or self._compressed() is not pl_module):
            self._forget()  # a new training of another module; a checkpoint's state comes after this hook

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find this callback's entry under the longer name that an earlier version gave it."""
        adopt_older_entry(self, self.settings.layers, checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for what can be chosen, while nothing is lost yet if that is nothing."""
        name, state = type(self).__name__, self._state
        if not self.finished and self._structure.made_small:
            warn_of_lost_state(name)
            self._small = True
        if self.finished:
            return
        require_operable_optimizers(name, trainer)
        warn_of_mirrors(name, pl_module)
        with isolate_rng(), as_written(trainer, pl_module):
            self._costs = measure_network(pl_module, example_inputs(trainer, pl_module), latency=False)
            groups = None if state is None else state["network"]["groups"]
            network = plan_network(name, self.settings, pl_module, example_inputs(trainer, pl_module), groups)
        self._network, self._norms = network, NormStatistics(pl_module)
        self._norms.batches = self._jump
        if state is None:
            return
        if self._mode == _WHOLE:
            if "scores" in state["network"]:
                network.scores.load_state_dict(state["network"]["scores"])
        else:
            self._attach(trainer, pl_module, network).load_state_dict(state)
            network.bypass(False)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the network smaller if it is time."""
        if not in_epoch(trainer):
            self._advance(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let masks and thresholds act as they do at this time."""
        if batch_idx == 0:  # resumed from behind an epoch's last batch, Lightning leaves out `on_train_epoch_start`
            self._advance(trainer, pl_module)
        if self._network is not None:
            self._let_act(trainer, pl_module, self._network, batch)
        if self._norms is not None:
            self._norms.before_batch()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Let scores and thresholds take their step, beside the user's optimizer."""
        if self._network is None or not self.settings.learned:
            return
        if self._mode == _WHOLE:
            self._network.scores.saliency.observe(None)
        elif self._mode == _SOFT and self._choice is not None:
            self._share, self._ranks = self._choice.step(_unscaling(trainer, pl_module.device))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the budget, and what is kept of every layer."""
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

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last epoch do what is still to be done, before checkpoints of this epoch are written."""
        if is_last_epoch(trainer):
            self._advance(trainer, pl_module, last=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what is still to be done, if the training was stopped early."""
        self._advance(trainer, pl_module, last=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if the network is not the small one, or was not saved."""
        name = type(self).__name__
        if not self.finished:
            rank_zero_warn(
                f"{name}: the training ended before `end={self.settings.end}` ({self.settings.unit}), "
                "so nothing was removed: the module is the dense one; train on, or choose an earlier `end`"
            )
        elif self.report is not None:
            warn_if_unsaved(name, trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module: a network that is not smaller yet is the dense one again."""
        self._rest_norms()
        network, self._network, self._norms = self._network, None, None
        for handle in (*self._handles, *self._hooks):
            handle.remove()
        self._handles.clear()
        self._hooks.clear()
        if network is not None:
            self._state = self._own_state(network)
            self._choice = None
            network.remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the module: ``teardown`` does not run after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """Scores, thresholds, their optimizer, and the report once the network is small."""
        own = self._state if self._network is None else self._own_state(self._network)
        place = {"mode": self._mode, "updated_at": self._updated_at, "share": float(self._share)}
        ranks = {name: float(rank) for name, rank in self._ranks.items()}
        report = None if self.report is None else self.report.to_json()
        more = {"small": self._small, "jump": self._jump}
        return {"own": own, **place, "ranks": ranks, "report": report, "record": self._record.state_dict(), **more}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's phase."""
        self._forget()
        entry = entry_of(type(self).__name__, state_dict)
        self._state = entry("own")
        if entry("report") is not None:
            self.report = CompressionReport.from_json(entry("report"))
        self._mode, self._updated_at, self._share = entry("mode"), entry("updated_at"), entry("share")
        self._ranks = dict(entry("ranks"))
        self._record.load_state_dict(entry("record"))
        self._small, self._jump = state_dict.get("small", False), state_dict.get("jump")

    def _own_state(self, network: BudgetedNetwork) -> dict[str, Any]:
        if self._choice is not None:
            return self._choice.state_dict()
        return {"network": network.state_dict(), "optimizer": None}

    def _rest_norms(self) -> None:
        if self._norms is not None:
            self._norms.after_batch()
            self._jump = self._norms.batches

    def _restart_norms(self) -> None:
        if self._norms is not None:
            self._norms.restart()

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
        self._choice = Choice(network, self.settings.rates)
        return self._choice

    def _let_act(self, trainer: Trainer, pl_module: LightningModule, network: BudgetedNetwork, batch: Any) -> None:
        settings = self.settings
        if not network.followed:
            with as_written(trainer, pl_module):
                require_fitting_steps(type(self).__name__, trainer, pl_module, network, batch)
        if self._mode == _HARD or not reached(trainer, settings.begin, settings.unit):
            return
        choice = self._choice or self._attach(trainer, pl_module, network)
        if reached(trainer, settings.end, settings.unit):
            self._harden(trainer, choice)
            return
        if self._mode == _WHOLE:
            network.begin()
        self._mode = _SOFT
        way = settings.way
        done = min(max(way(training_progress(trainer, with_totals=way.needs_total)), 0.0), 1.0)
        if settings.learned:
            choice.act(done)
        elif self._updated_at < 0 or trainer.global_step >= self._updated_at + settings.update_every:
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
        """Make the network smaller if it is time, between two epochs."""
        settings, network = self.settings, self._network
        if network is None or not reached(trainer, settings.end, settings.unit, between_epochs=True):
            return
        choosing = self._choice or self._attach(trainer, pl_module, network)
        if self._mode != _HARD:
            self._harden(trainer, choosing)
        choice = trainer.strategy.broadcast(network.choose())  # ranks may have risen again since
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        network.bake(choice)
        with as_written(trainer, pl_module):
            operate(trainer, pl_module, lambda: network.shrink(choice))
            inputs = example_inputs(trainer, pl_module)
            report = budget_report(self._costs, pl_module, inputs, network, choice, settings)
        self._restart_norms()
        self.report, self._network, self._state, self._choice = report, None, None, None
        self._compressed, self._share = weakref.ref(pl_module), choice.cost / network.budget.dense
        self._record.add(trainer.global_step, self._share, network.kept_shares(choice.kept), choice.ranks, last=True)
        forget_best(type(self).__name__, trainer)
        if last:
            recalibrate_norms(trainer, pl_module)
        if settings.figures and trainer.is_global_zero:
            self._record.draw(trainer, report, settings)


def _unscaling(trainer: Trainer, device: torch.device) -> Tensor | None:
    """Return the factor that undoes the scale of fp16: Lightning unscales the user's optimizer's parameters only."""
    scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else 1 / scaler.scale(torch.ones((), device=device))
