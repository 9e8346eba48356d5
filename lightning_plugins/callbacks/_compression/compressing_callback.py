"""Base of the callbacks that end in a smaller network: phases, checkpoints from before and after, batch norms."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch.utils.hooks import RemovableHandle

from lightning_plugins._lightning import Callback, LightningModule, ModelParallelStrategy, Trainer, rank_zero_warn
from lightning_plugins.callbacks._compression.recalibration import recalibrate_norms
from lightning_plugins.callbacks._compression.saved_state import adopt_older_entry, entry_of, warn_of_lost_state
from lightning_plugins.callbacks._surgery.averages import renew_averages
from lightning_plugins.callbacks._surgery.monitors import forget_best, warn_if_unsaved
from lightning_plugins.callbacks._surgery.restored_structure import StructureHook
from lightning_plugins.callbacks._surgery.sharding import SavedStructure, require_shards_inside
from lightning_plugins.callbacks._surgery.swap import require_operable_optimizers
from lightning_plugins.callbacks._trainer.phases import in_epoch, is_last_epoch
from lightning_plugins.callbacks._trainer.requirements import require_lightning_module, require_same_on_ranks
from lightning_plugins.compression.networks.norm_statistics import NormStatistics
from lightning_plugins.compression.reports.report import CompressionReport


class CompressingCallback(Callback, ABC):
    """A training that ends in a smaller network.

    A subclass implements its requirements (`_require`), its start (`_begin`) and its work between two epochs
    (`_advance`, which calls `_deliver` at the end), and says why a training ended too early (`_missed`).

    Args:
        layers: The layers to compress.
    """

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.layers = layers
        self._compressed: weakref.ref[LightningModule] | None = None
        self._handles: list[RemovableHandle | SavedStructure] = []
        self._structure = StructureHook()
        self._norms: NormStatistics | None = None
        self._forget()

    def _forget(self) -> None:
        """Begin with another module."""
        self.report: CompressionReport | None = None
        self._small = False  # as in a checkpoint that another callback wrote
        self._jump: int | None = None  # batches since the last abrupt change

    @abstractmethod
    def _require(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse modules and Trainers that the callback does not work with."""

    @abstractmethod
    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the dense network at the start of a fit."""

    @abstractmethod
    def _advance(self, trainer: Trainer, pl_module: LightningModule, *, last: bool = False) -> None:
        """Do pending work between two epochs."""

    @abstractmethod
    def _missed(self) -> str | None:
        """Return the end of a warning about a training that ended before the network was small; None for none."""

    @abstractmethod
    def _arguments(self) -> str:
        """Return a description of the settings that must agree on all processes."""

    @property
    def finished(self) -> bool:
        """True if the network is the small one."""
        return self.report is not None or self._small

    @property
    def state_key(self) -> str:
        """The class and the layers, so that a training is resumed with other rates, figures or budgets as well."""
        return self._generate_state_key(layers=self.layers)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module and the Trainer, and make the module ready for checkpoints of its compressed form."""
        require_lightning_module(type(self).__name__, pl_module)
        self._structure.made_small = False
        self._handles.append(pl_module.register_load_state_dict_pre_hook(self._structure))  # type: ignore[no-untyped-call]  # torch does not annotate it
        if isinstance(trainer.strategy, ModelParallelStrategy):
            self._handles.append(SavedStructure(type(self).__name__, trainer, pl_module, self._structure.note))
        if stage != "fit":
            return
        self._require(trainer, pl_module)
        require_same_on_ranks(type(self).__name__, (), self._arguments())
        if trainer.global_step == 0 and (self._compressed is None or self._compressed() is not pl_module):
            self._forget()  # a new training of another module; a checkpoint's state comes after this hook

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find this callback's entry under the longer name that an earlier version gave it."""
        adopt_older_entry(self, self.layers, checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the layers, which the module may have only now, and at the optimizers."""
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._look(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at layers and optimizers where a checkpoint was loaded after ``on_fit_start``."""
        if trainer.strategy.restore_checkpoint_after_setup:
            self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = type(self).__name__
        if not self.finished and self._structure.made_small:
            warn_of_lost_state(name)
            self._small = True
        self._norms = NormStatistics(pl_module)
        self._norms.batches = self._jump
        if self.finished:
            return
        require_operable_optimizers(name, trainer)
        require_shards_inside(name, pl_module)
        self._begin(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do pending work."""
        if not in_epoch(trainer):
            self._advance(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish pending work after the last epoch, before its checkpoints are written."""
        if is_last_epoch(trainer):
            self._advance(trainer, pl_module, last=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish pending work if the training was stopped early."""
        self._advance(trainer, pl_module, last=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the network is not the small one, or was not saved."""
        name = type(self).__name__
        if not self.finished and (missed := self._missed()) is not None:
            rank_zero_warn(f"{name}: training ended before {missed}")
        elif self.report is not None:
            warn_if_unsaved(name, trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module."""
        self._rest_norms()
        self._norms = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the module: ``teardown`` does not run after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """Return the report, and how far running statistics of batch norms have come."""
        report = None if self.report is None else self.report.to_json()
        return {"report": report, "small": self._small, "jump": self._jump}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's phase."""
        self._forget()
        entry = entry_of(type(self).__name__, state_dict)
        if entry("report") is not None:
            self.report = CompressionReport.from_json(entry("report"))
        self._small, self._jump = state_dict.get("small", False), state_dict.get("jump")
        self._resume(entry)

    @abstractmethod
    def _resume(self, entry: Callable[[str], Any]) -> None:
        """Take over the subclass's part of a state, which is read by key."""

    def _deliver(self, trainer: Trainer, pl_module: LightningModule, report: CompressionReport, *, last: bool) -> None:
        """Note that the module is the small network from now on."""
        self.report, self._compressed = report, weakref.ref(pl_module)
        self._restart_norms()
        forget_best(type(self).__name__, trainer)
        if last:
            recalibrate_norms(trainer, pl_module)
        renew_averages(trainer, pl_module)

    def _rest_norms(self) -> None:
        if self._norms is not None:
            self._norms.after_batch()
            self._jump = self._norms.batches

    def _restart_norms(self) -> None:
        if self._norms is not None:
            self._norms.restart()
