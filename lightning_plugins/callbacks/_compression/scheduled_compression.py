"""What the callbacks that compress under a budget have in common: phases, own optimizer, surgery, checkpoints."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_plugins._lightning import Callback, LightningModule, MixedPrecision, Trainer, isolate_rng, rank_zero_warn
from lightning_plugins.callbacks._compression.costs import example_inputs
from lightning_plugins.callbacks._compression.record import ChoiceRecord
from lightning_plugins.callbacks._compression.report import budget_report
from lightning_plugins.callbacks._compression.requirements import require_alone, require_compression
from lightning_plugins.callbacks._compression.settings import CompressionSettings
from lightning_plugins.callbacks._surgery.rewrapping import rewrap
from lightning_plugins.callbacks._surgery.swap import operate, require_operable_optimizers
from lightning_plugins.callbacks._terms.logged import log_value
from lightning_plugins.callbacks._trainer.phases import is_last_epoch, reached
from lightning_plugins.callbacks._trainer.progress import training_progress
from lightning_plugins.callbacks._trainer.requirements import require_lightning_module
from lightning_plugins.callbacks.low_rank_compression import LowRankCompression
from lightning_plugins.compression.budget.budgeted_network import BudgetedNetwork
from lightning_plugins.compression.budget.choice_optimizer import ChoiceOptimizer
from lightning_plugins.compression.costs.network_costs import measure_network
from lightning_plugins.compression.networks.plain_names import plain_names
from lightning_plugins.compression.reports.report import CompressionReport
from lightning_plugins.compression.structure.restore_structure import restore_structure

_SOFT, _WHOLE, _HARD = "soft", "whole", "hard"


class ScheduledCompression(Callback):
    """Choose channels and ranks under a budget while a network trains, then make it smaller and train on.

    `HybridCompression` says what happens when. Masks and thresholds are on the module between ``on_fit_start`` and the
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
        self._network: BudgetedNetwork | None = None
        self._forget()

    def _forget(self) -> None:
        self.report: CompressionReport | None = None
        self._state: dict[str, Any] | None = None  # of the network and its optimizer, while they are not there
        self._mode = _WHOLE
        self._updated_at = -1
        self._done, self._beta = 0.0, 1.0  # how much of what the budget takes is gone, and the inverse temperature
        self._share: Tensor | float = 1.0
        self._ranks: dict[str, Any] = {}  # numbers, as tensors on the device or from a checkpoint
        self._record = ChoiceRecord()

    @property
    def finished(self) -> bool:
        """Whether the network is the small one."""
        return self.report is not None

    @property
    def state_key(self) -> str:
        """Unique for every different instance, so that several keep their own entries in a checkpoint."""
        return self._generate_state_key(**self.settings.for_key())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module and the Trainer, and make the module ready for checkpoints of its compressed form."""
        require_lightning_module(type(self).__name__, pl_module)
        self._handles.append(pl_module.register_load_state_dict_pre_hook(_restore))  # type: ignore[no-untyped-call]  # torch's
        if stage != "fit":
            return
        require_compression(type(self).__name__, self.settings, trainer, pl_module)
        require_alone(self, trainer, (ScheduledCompression, LowRankCompression))
        if trainer.global_step == 0 and (self._compressed is None or self._compressed() is not pl_module):
            self._forget()  # a new training of another module; a checkpoint's state comes after this hook

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put masks and thresholds on: optimizers and DDP are there by now and have not seen them."""
        if self.finished:
            return
        require_operable_optimizers(type(self).__name__, trainer)
        settings, state = self.settings, self._state
        with isolate_rng(), _as_written(trainer, pl_module):
            inputs = example_inputs(trainer, pl_module)
            self._costs = measure_network(pl_module, inputs, latency=False)
            groups = None if state is None else state["network"]["groups"]
            network = BudgetedNetwork(
                pl_module,
                settings.layers,
                settings.budget,
                cost=settings.cost,
                inputs=inputs,
                masks=settings.masks,
                ranks=settings.ranks,
                keep=settings.keep,
                minimum=settings.minimum,
                multiple=settings.multiple,
                refresh_every=settings.refresh_every,
                groups=groups,
            )
        self._optimizer = ChoiceOptimizer(network.kinds())
        self._network = network
        save, load = plain_names(
            network.renamed, {"channel_masks": network.masks, "rank_thresholds": network.thresholds}
        )
        self._hooks = [
            pl_module.register_state_dict_post_hook(save),  # type: ignore[no-untyped-call]  # torch's
            pl_module.register_load_state_dict_pre_hook(load),  # type: ignore[no-untyped-call]  # torch's
        ]
        rewrap(trainer, pl_module, ("channel_masks", "rank_thresholds"))
        if state is not None:
            network.load_state_dict(state["network"])
            self._optimizer.load_state_dict(state["optimizer"])
            network.bypass(self._mode == _WHOLE)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the network smaller if it is time."""
        self._advance(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let masks and thresholds act as they do at this time."""
        if batch_idx == 0:  # resumed from behind an epoch's last batch, Lightning leaves out `on_train_epoch_start`
            self._advance(trainer, pl_module)
        network, settings = self._network, self.settings
        if network is None or self._mode == _HARD or not reached(trainer, settings.begin, settings.unit):
            return
        if reached(trainer, settings.end, settings.unit):
            self._harden(trainer, network)
            return
        if self._mode == _WHOLE:
            network.begin()
        self._mode = _SOFT
        way = settings.way
        done = min(max(way(training_progress(trainer, with_totals=way.needs_total)), 0.0), 1.0)
        self._done, self._beta = settings.removed(done), settings.beta(done)
        if settings.learned:
            network.be_soft(self._beta)
        elif self._updated_at < 0 or trainer.global_step >= self._updated_at + settings.update_every:
            self._updated_at = trainer.global_step
            choice = network.choose_heaviest(1 - self._done * (1 - settings.budget))
            network.be_hard(choice.kept)
            self._share = choice.cost / network.budget.dense

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Let scores and thresholds take their step, beside the user's optimizer."""
        network = self._network
        if network is None or self._mode != _SOFT or not self.settings.learned:
            return
        spectra = network.spectra()  # those of the forward pass: the scores' step would make them old
        self._optimizer.step(self.settings.rates(self._beta), _unscaling(trainer, pl_module.device))
        self._share, self._ranks = network.shift.settle(spectra, self._done)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the budget, and what is kept of every layer."""
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
            self._advance(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what is still to be done, if the training was stopped early."""
        self._advance(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if the network is not the small one."""
        if not self.finished:
            rank_zero_warn(
                f"{type(self).__name__}: the training ended before `end={self.settings.end}` ({self.settings.unit}), "
                "so nothing was removed: the module is the dense one; train on, or choose an earlier `end`"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module: a network that is not smaller yet is the dense one again."""
        if self._network is not None:
            self._state = self._own_state()
            self._let_go()
            self._network.remove()
            self._network = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the module: ``teardown`` does not run after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """Scores, thresholds, their optimizer, and the report once the network is small."""
        own = self._state if self._network is None else self._own_state()
        place = {"mode": self._mode, "updated_at": self._updated_at, "share": float(self._share)}
        ranks = {name: float(rank) for name, rank in self._ranks.items()}
        report = None if self.report is None else self.report.to_json()
        return {"own": own, **place, "ranks": ranks, "report": report, "record": self._record.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's phase."""
        self._forget()
        self._state = state_dict["own"]
        if state_dict["report"] is not None:
            self.report = CompressionReport.from_json(state_dict["report"])
        self._mode, self._updated_at = state_dict["mode"], state_dict["updated_at"]
        self._share = state_dict["share"]
        self._ranks = dict(state_dict["ranks"])
        self._record.load_state_dict(state_dict["record"])

    def _own_state(self) -> dict[str, Any]:
        if self._network is None:
            return {}
        return {"network": self._network.state_dict(), "optimizer": self._optimizer.state_dict()}

    def _let_go(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _harden(self, trainer: Trainer, network: BudgetedNetwork) -> None:
        """End the choice: masks are zeros and ones from now on."""
        settings = self.settings
        choice = network.choose() if settings.learned else network.choose_heaviest(settings.budget)
        choice = trainer.strategy.broadcast(choice)
        network.be_hard(choice.kept)
        self._mode, self._share = _HARD, choice.cost / network.budget.dense

    def _advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the network smaller if it is time, between two epochs."""
        settings, network = self.settings, self._network
        if network is None or not reached(trainer, settings.end, settings.unit, between_epochs=True):
            return
        if self._mode != _HARD:
            self._harden(trainer, network)
        choice = trainer.strategy.broadcast(network.choose())  # ranks may have risen again since
        self._let_go()
        network.bake(choice)
        with _as_written(trainer, pl_module):
            operate(trainer, pl_module, lambda: network.shrink(choice))
            inputs = example_inputs(trainer, pl_module)
            report = budget_report(self._costs, pl_module, inputs, network, choice, settings)
        self.report, self._network, self._state = report, None, None
        self._compressed, self._share = weakref.ref(pl_module), choice.cost / network.budget.dense
        self._record.add(trainer.global_step, self._share, network.kept_shares(choice.kept), choice.ranks, last=True)
        if settings.figures and trainer.is_global_zero:
            self._record.draw(trainer, report, settings)


def _unscaling(trainer: Trainer, device: torch.device) -> Tensor | None:
    """What undoes the scale of fp16: Lightning unscales the parameters of the user's optimizer only."""
    scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else 1 / scaler.scale(torch.ones((), device=device))


@contextmanager
def _as_written(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
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


def _restore(module: Any, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Run before a state dict is loaded: Lightning restores the module before callbacks know anything."""
    own = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    if "channel_masks" not in module._modules and "rank_thresholds" not in module._modules:
        restore_structure(module, own, strict=False)  # names that are missing or too many are for `load_state_dict`
