"""Probe layers for targets during training, validation and test."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_plugins._checks import check_names
from lightning_plugins._lightning import Callback, LightningModule, Trainer, TrainerFn
from lightning_plugins.callbacks._monitors.figures import PendingFigures, require_figures
from lightning_plugins.callbacks._probes.controls import check_controls, require_whole_network
from lightning_plugins.callbacks._probes.rows import Positions, RowSelection
from lightning_plugins.callbacks._probes.session import ControlSettings, ProbeSession, check_options
from lightning_plugins.callbacks._terms.training_step import WrappedStep, join_training_step
from lightning_plugins.callbacks._trainer.requirements import (
    makes_layers_late,
    require_supported,
)
from lightning_plugins.metrics import ProbeResult
from lightning_plugins.plots import probe_profile_figure
from lightning_plugins.selection import check_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Stage = Literal["train", "val", "test"]
STAGES: tuple[Stage, ...] = ("train", "val", "test")
_STAGE_OF = {"fit": STAGES[:2], "validate": ("val",), "test": ("test",)}


class LayerProbe(Callback):
    """Ask at every epoch how well targets can be read from layers by a linear map, on groups that were held out.

    Every batch adds to sums of products on the device; at the end of the epoch those of all processes give the probes
    of `lightning_plugins.metrics.LinearProbe`, whatever the batches were. Nothing is trained, nothing in the training
    changes, and the module's part of a checkpoint is what it would be without. Training rows come from weights that
    change meanwhile.

    Logged through ``pl_module.log`` as ``probe/<train|val|test>/<layer>/<name>``, means over targets: ``r2``,
    ``pearson``, ``rmse``, ``v_information``, ``selectivity``, ``control_r2``, ``evidence``, ``description_length``; for
    classes ``accuracy``, ``control_accuracy`` and ``selectivity``; and a figure ``probe/<stage>/profile``, the score
    over the layers. `results` has all that was found, `profiles` the scores by stage, step and layer. Where rows allow
    no fit (too few groups in a short validation) a warning says why and nothing is logged.

    Controls beside the random targets of the probe: ``"initial"`` runs a copy of the network at the weights that the
    training began with on the same inputs (``<layer>@initial``), a second forward pass; these weights are saved with
    the callback. ``"projection"`` probes a random projection of the batch's first tensor, as wide as the widest layer.

    Args:
        layers: Dotted name of a layer, a glob over names, or several of them; ``"backbone.fc:input"`` takes what the
            layer receives.
        targets: Key of the batch, position in it, a callable of the batch, or the import path of one. One entry per
            row: per sample, or, with ``positions="tokens"``, per token.
        groups: The same, of integers: rows of a group are never split. None tells samples apart by the contents of the
            batch's first tensor.
        mask: The same, of shape ``(N, L)``: which tokens count, such as ``"attention_mask"``.
        positions: ``"tokens"``, ``"cls"`` (the first), ``"mean"`` (over the tokens of the mask, or over positions), or
            a callable of a layer's tensor and the batch that gives rows ``(R, d)`` (or its import path).
        probe: Further arguments of `lightning_plugins.metrics.LinearProbe`, such as ``{"weight": "group"}``, and the
            ``reservoir`` of its `ProbeClassifier`.
        stages: Out of ``"train"``, ``"val"`` and ``"test"``.
        controls: Out of ``"initial"`` and ``"projection"``.
        figures: Whether to draw; needs matplotlib.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of the wrong type.
        ImportError: If ``figures`` are wanted and matplotlib is missing.

    Example:
        >>> probe = LayerProbe("encoder.layer.*", "idf", groups="word", mask="is_word", positions="tokens")
        >>> probe.stages
        ('val', 'test')
    """

    method = "probe"

    def __init__(
        self,
        layers: str | list[str],
        targets: str | int | Callable[[Any], Tensor],
        *,
        groups: str | int | Callable[[Any], Tensor] | None = None,
        mask: str | int | Callable[[Any], Tensor] | None = None,
        positions: Positions = "mean",
        probe: Mapping[str, Any] | None = None,
        stages: Sequence[str] = ("val", "test"),
        controls: Sequence[str] = (),
        figures: bool = True,
    ) -> None:
        super().__init__()
        self.layers = check_layers(layers, sides=True)
        self.rows = RowSelection(targets, groups, mask, positions)
        self.probe = check_options(probe)
        self.stages = check_names("stages", stages, STAGES)
        if not self.stages:
            raise ValueError("`stages` must name at least one of 'train', 'val' and 'test', got none")
        self.controls = check_controls(controls)
        self.figures = require_figures(figures)
        self.results: dict[str, dict[str, ProbeResult]] = {}
        self.profiles: dict[str, dict[int, dict[str, float]]] = {stage: {} for stage in self.stages}
        self._epoch: int | None = None  # of the training sums
        self._restored: dict[str, Any] | None = None  # sums from a checkpoint, until the devices are known
        self._initial: dict[str, Tensor] | None = None  # weights that the training began with
        self._session: ProbeSession | None = None
        self._step: WrappedStep | None = None
        self._recording = ExitStack()  # of the batch under way in validation and test
        self._drawing = PendingFigures(self._figure if figures else None)

    @property
    def state_key(self) -> str:
        """Unique for every different instance, so that several keep their own entries in a checkpoint."""
        return self._generate_state_key(layers=self.layers, rows=self.rows.name, probe=dict(self.probe))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module and the Trainer, register the hooks and join the training step."""
        if not set(_STAGE_OF.get(stage, ())) & set(self.stages):
            return
        require_supported(self, trainer, pl_module, f"{self.stages} {self.controls}")
        require_whole_network(self.controls, trainer)
        if stage == "fit":
            if trainer.global_step == 0:  # a new training
                self.profiles = {stage: {} for stage in self.stages}
                self._epoch = self._initial = None
            if "train" in self.stages:
                self._step = join_training_step(pl_module, self)
        if not makes_layers_late(pl_module):
            self._attach(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register the hooks of layers that have just been made."""
        self._attach(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the weights of the beginning, and take over the sums of a checkpoint, on one process alone.

        From a checkpoint taken after an epoch's last batch but before its end, Lightning goes on with the next epoch
        and calls no hook for the end of the last one; its probes are fitted here.
        """
        if self._session is None:
            return
        self._initial = self._session.begin(self._initial)
        if self._restored is not None:
            if trainer.is_global_zero:
                self._session.load_state(self._restored, pl_module.device)
            self._restored = None
            if self._epoch != trainer.current_epoch:
                self._summarize("train", trainer, pl_module, log=False)
        self._epoch = trainer.current_epoch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch for the training step."""
        self._epoch = trainer.current_epoch
        if self._session is not None:
            self._session.batch = batch

    @contextmanager
    def recording(self, pl_module: LightningModule) -> Iterator[None]:
        """Record the layers of a training step (for the wrapper of the training step)."""
        if self._session is None:
            yield
            return
        with self._session.recording():
            yield
        with torch.inference_mode(False):
            self._session.add("train")

    def penalty(self, pl_module: LightningModule) -> None:
        """Nothing is added to the loss (for the wrapper of the training step)."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit and log the probes of the epoch's training steps."""
        if "train" in self.stages:
            self._summarize("train", trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw new data since the last figures."""
        self._drawing.draw(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register the hooks of layers that have just been made."""
        self._begin_evaluation("val", trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register the hooks of layers that have just been made."""
        self._begin_evaluation("test", trainer, pl_module)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, *_: Any, **__: Any) -> None:
        """Record the layers' tensors, except in a sanity check."""
        self._record("val", trainer, batch)

    def on_test_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, *_: Any, **__: Any) -> None:
        """Record the layers' tensors."""
        self._record("test", trainer, batch)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Add this batch's rows to the sums."""
        self._add("val", trainer, pl_module)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Add this batch's rows to the sums."""
        self._add("test", trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit and log the probes of the whole validation."""
        if not trainer.sanity_checking and "val" in self.stages:
            self._summarize("val", trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit and log the probes of the whole test."""
        if "test" in self.stages:
            self._summarize("test", trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        self._recording.close()
        if self._session is not None:
            self._session.detach()
        if self._step is not None:
            self._step.leave(self)
        self._session = self._step = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was: ``teardown`` does not run after an exception."""
        self.teardown(trainer, pl_module, stage="fit")

    def state_dict(self) -> dict[str, Any]:
        """The scores of earlier epochs, the sums of the one under way, and the weights of the beginning."""
        sums = {} if self._session is None else self._session.state()
        return self._state_with(self._restored if self._restored is not None else sums)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the sums of all processes, where `state_dict` knows those of its own."""
        if trainer.world_size > 1 and self._session is not None and self._restored is None:
            checkpoint["callbacks"][self.state_key] = self._state_with(self._session.state_of_all(pl_module.device))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's scores and sums."""
        for stage, steps in state_dict["profiles"].items():
            self.profiles[stage] = {int(step): dict(scores) for step, scores in steps.items()}
        self._restored, self._epoch = state_dict["sums"], state_dict["epoch"]
        self._initial = state_dict["initial"]

    def _state_with(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        return {"profiles": self.profiles, "sums": dict(sums), "epoch": self._epoch, "initial": self._initial}

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._session is None:
            controls = ControlSettings(self.controls, trainer.precision_plugin.forward_context)
            self._session = ProbeSession(pl_module, self.layers, self.rows, self.probe, self.stages, controls)

    def _begin_evaluation(self, stage: Stage, trainer: Trainer, pl_module: LightningModule) -> None:
        if stage in self.stages:
            self._attach(trainer, pl_module)
            if self._session is not None and trainer.state.fn != TrainerFn.FITTING:
                self._session.begin(self._initial, new=False)

    def _record(self, stage: Stage, trainer: Trainer, batch: Any) -> None:
        if self._session is not None and stage in self.stages and not trainer.sanity_checking:
            self._session.batch = batch
            self._recording.enter_context(self._session.recording())

    @torch.no_grad()
    def _add(self, stage: Stage, trainer: Trainer, pl_module: LightningModule) -> None:
        self._recording.close()
        if self._session is not None and stage in self.stages and not trainer.sanity_checking:
            with torch.inference_mode(False):  # sums made in inference mode could not be saved and added to
                self._session.add(stage)

    @torch.no_grad()
    def _summarize(self, stage: Stage, trainer: Trainer, pl_module: LightningModule, *, log: bool = True) -> None:
        if self._session is None:
            return
        with torch.inference_mode(False):
            found = self._session.results(stage, pl_module.device)
        if not found:
            return
        self.results[stage] = found
        for label, result in found.items() if log else ():
            for name, value in result.headline().items():
                # all processes have the same value, and the largest of equal numbers is exactly that number
                pl_module.log(f"probe/{stage}/{label}/{name}", value.float(), sync_dist=True, reduce_fx="max")
        self.profiles[stage][trainer.global_step] = {label: result.score for label, result in found.items()}
        self._drawing.add(stage)
        draw = self._drawing.draw_if_time if trainer.state.fn == TrainerFn.FITTING else self._drawing.draw
        draw(trainer)

    def _figure(self, stage: str) -> "tuple[str, Figure]":
        steps = self.profiles[stage]
        score = "accuracy" if self.probe.get("task") == "classification" else "held-out R²"
        figure = probe_profile_figure(list(steps.values()), list(steps), score=score, title=f"Probes, {stage}")
        return f"probe/{stage}/profile", figure
